"""MobileVlm -> three ONNX files in the onnx-community layout, written weight by weight for plain onnxruntime."""

from __future__ import annotations

from bundle.manifest import GraphName, GraphQuantization, Precision
from distill.models.mobilevlm import MobileVlm
from export.contract import ExportedGraphs, ExportRequest
from export.onnx_decoder import write_decoder, write_embedding
from export.onnx_linear import ModelWriter, StoredWeights
from export.onnx_vision import write_vision_encoder
from export.onnx_weights import CHANNEL_BLOCK
from export.recipe import fallbacks

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
        quantization=_quantization(vlm, precision),
        dequantized=stored,
    )


# How each graph's matrices are stored and what its kernels are fed.
PLAIN = GraphQuantization(weights="float32", activations="float32")
HALF = GraphQuantization(weights="float16", activations="float32")
TOKENS_8 = GraphQuantization(weights="int8 symmetric", activations="int8 dynamic per token")
BLOCKS_8 = GraphQuantization(
    weights="int8 symmetric", group_size=CHANNEL_BLOCK, activations="int8 dynamic per block of the weights"
)
BLOCKS_4 = GraphQuantization(
    weights="int4 symmetric, lm_head int8", group_size=32, activations="int8 dynamic per block of the weights"
)
TABLE_8 = GraphQuantization(weights="int8 symmetric", group_size=CHANNEL_BLOCK, activations="float32")
QUANTIZATION: dict[Precision, dict[GraphName, GraphQuantization]] = {
    "int4": {"vision_encoder": TOKENS_8, "token_embedding": TABLE_8, "text_decoder": BLOCKS_4},
    "int8": {"vision_encoder": TOKENS_8, "token_embedding": TABLE_8, "text_decoder": BLOCKS_8},
    "fp16": {"vision_encoder": HALF, "token_embedding": HALF, "text_decoder": HALF},
    "fp32": {"vision_encoder": PLAIN, "token_embedding": PLAIN, "text_decoder": PLAIN},
}


def _quantization(vlm: MobileVlm, precision: Precision) -> dict[GraphName, GraphQuantization]:
    """The table's row, with the number of decoder matrices whose width the group does not divide."""
    row = dict(QUANTIZATION[precision])
    odd = fallbacks({name: tuple(weight.shape) for name, weight in vlm.state_dict().items()}, precision)
    if odd:
        decoder = row["text_decoder"]
        weights = f"{decoder.weights}; {len(odd)} int8 (width not a multiple of {decoder.group_size})"
        row["text_decoder"] = decoder.model_copy(update={"weights": weights})
    return row
