"""MobileVlm -> three ONNX files in the onnx-community layout, written weight by weight for plain onnxruntime."""

from __future__ import annotations

from bundle.manifest import GraphName, GraphQuantization, Precision
from export.contract import ExportedGraphs, ExportRequest
from export.onnx_decoder import write_decoder, write_embedding
from export.onnx_linear import ModelWriter, StoredWeights
from export.onnx_vision import write_vision_encoder
from export.onnx_weights import CHANNEL_BLOCK

SUFFIX: dict[Precision, str] = {"int4": "_q4", "int8": "_quantized", "fp16": "_fp16", "fp32": ""}
STEMS: dict[GraphName, str] = {
    "vision_encoder": "vision_encoder",
    "token_embedding": "embed_tokens",
    "text_decoder": "decoder_model_merged",
}


def export_onnx(request: ExportRequest) -> ExportedGraphs:
    """Write the vision encoder, the token embedding and the decoder under ``request.output``/onnx."""
    vlm, precision = request.vlm, request.precision
    (request.output / "onnx").mkdir()
    weights, stored = vlm.state_dict(), StoredWeights()
    paths = {name: f"onnx/{stem}{SUFFIX[precision]}.onnx" for name, stem in STEMS.items()}

    def writer(name: GraphName) -> ModelWriter:
        return ModelWriter(request.output / paths[name], weights, precision, stored)

    vision = write_vision_encoder(writer("vision_encoder"), vlm, paths["vision_encoder"])
    request.progress(f"vision encoder written: {vision.path}")
    embedding = write_embedding(writer("token_embedding"), vlm, paths["token_embedding"])
    request.progress(f"token embedding written: {embedding.path}")
    decoder = write_decoder(writer("text_decoder"), vlm, request.context_length, paths["text_decoder"])
    request.progress(f"text decoder written: {decoder.path}")
    return ExportedGraphs(
        graphs={"vision_encoder": vision, "token_embedding": embedding, "text_decoder": decoder},
        quantization=QUANTIZATION[precision],
        dequantized=stored,
    )


def _int8(activations: str) -> GraphQuantization:
    return GraphQuantization(weights="int8 symmetric", group_size=CHANNEL_BLOCK, activations=activations)


DYNAMIC = "int8 dynamic per block"
PLAIN = GraphQuantization(weights="float32", activations="float32")
HALF = GraphQuantization(weights="float16", activations="float32")
QUANTIZATION: dict[Precision, dict[GraphName, GraphQuantization]] = {
    "int4": {
        "vision_encoder": _int8(DYNAMIC),
        "token_embedding": _int8("float32"),
        "text_decoder": GraphQuantization(weights="int4 symmetric, lm_head int8", group_size=32, activations=DYNAMIC),
    },
    "int8": {"vision_encoder": _int8(DYNAMIC), "token_embedding": _int8("float32"), "text_decoder": _int8(DYNAMIC)},
    "fp16": {"vision_encoder": HALF, "token_embedding": HALF, "text_decoder": HALF},
    "fp32": {"vision_encoder": PLAIN, "token_embedding": PLAIN, "text_decoder": PLAIN},
}
