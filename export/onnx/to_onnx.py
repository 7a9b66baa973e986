"""MobileVlm -> three ONNX files in the onnx-community layout, written weight by weight for plain onnxruntime.

What onnxruntime-genai needs to open the same files is written beside them (export/onnx/genai.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from pydantic import TypeAdapter

from bundle.manifest import Graph, GraphName, GraphQuantization, Precision
from export.contract import INT4_GROUP, ExportedGraphs, ExportRequest
from export.job.meter import Meter
from export.model.graph_weights import graph_of
from export.onnx.decoder import write_decoder, write_embedding
from export.onnx.genai import write_genai
from export.onnx.linear import ModelWriter, WeightSource
from export.onnx.stored import Stored, StoredWeights
from export.onnx.vision import write_vision_encoder
from export.weights.blocks import CHANNEL_BLOCK
from export.weights.described import described, with_fallbacks
from export.weights.recipe import RECIPES, fallbacks

FOLDER = "onnx"
SUFFIX: dict[Precision, str] = {"int4": "_q4", "int8": "_quantized", "fp16": "_fp16", "fp32": ""}
STEMS: dict[GraphName, str] = {
    "vision_encoder": "vision_encoder",
    "token_embedding": "embed_tokens",
    "text_decoder": "decoder_model_merged",
}
STORED = TypeAdapter(dict[str, Stored])


def export_onnx(request: ExportRequest) -> ExportedGraphs:
    """Write the vision encoder, the token embedding and the decoder under ``request.output``/onnx."""
    vlm, precision = request.vlm, request.precision
    folder = request.output / FOLDER
    folder.mkdir(exist_ok=True)
    paths = {name: f"{FOLDER}/{stem}{SUFFIX[precision]}.onnx" for name, stem in STEMS.items()}
    graphs, stored = _finished_before(request)
    todo = {name: write for name, write in _writers(request, paths).items() if name not in graphs}
    shapes = request.shapes
    values = sum(math.prod(shape) for name, shape in shapes.items() if graph_of(name, vlm) in todo)
    source = WeightSource(
        weights=vlm.state_dict() if request.weights is None else request.weights,
        shapes=shapes,
        recipe=request.recipe,
        overrides=request.onnx.storages,
        meter=Meter("weights written", values, request.progress),
        chosen=request.chosen,
    )
    for name, write in todo.items():
        writer = ModelWriter(request.output / paths[name], source)
        graphs[name] = write(writer)
        stored |= writer.stored
        if request.work is not None:
            files = [path for path in (writer.path, writer.data_path) if path.exists()]
            records = STORED.dump_python(writer.stored, mode="json")
            request.work.finish(name, files, {"graph": graphs[name].model_dump(mode="json"), "stored": records})
        request.progress(f"{name.replace('_', ' ')} written: {paths[name]}")
    write_genai(request, {name: graphs[name] for name in STEMS})
    return ExportedGraphs(
        graphs={name: graphs[name] for name in STEMS},
        quantization=_quantization(request),
        dequantized=StoredWeights(folder, stored),
    )


def _writers(request: ExportRequest, paths: dict[GraphName, str]) -> dict[GraphName, Callable[[ModelWriter], Graph]]:
    vlm = request.vlm
    return {
        "vision_encoder": partial(write_vision_encoder, vlm=vlm, path=paths["vision_encoder"]),
        "token_embedding": partial(write_embedding, vlm=vlm, path=paths["token_embedding"]),
        "text_decoder": partial(
            write_decoder,
            vlm=vlm,
            context_length=request.context_length,
            path=paths["text_decoder"],
            half_cache=request.onnx.fp16_cache,
        ),
    }


def _finished_before(request: ExportRequest) -> tuple[dict[GraphName, Graph], dict[str, Stored]]:
    """What a run that was killed left behind."""
    graphs: dict[GraphName, Graph] = {}
    stored: dict[str, Stored] = {}
    for name in STEMS:
        note = None if request.work is None else request.work.finished(name)
        if note is not None:
            graphs[name] = Graph.model_validate(note["graph"])
            stored |= STORED.validate_python(note["stored"])
            request.progress(f"{name.replace('_', ' ')} is whole from the run before: {graphs[name].path}")
    return graphs, stored


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
TABLE_4 = GraphQuantization(weights="int4 symmetric", group_size=INT4_GROUP, activations="float32")
TABLE_8 = GraphQuantization(weights="int8 symmetric", group_size=CHANNEL_BLOCK, activations="float32")
QUANTIZATION: dict[Precision, dict[GraphName, GraphQuantization]] = {
    "int4": {"vision_encoder": TOKENS_8, "token_embedding": TABLE_8, "text_decoder": BLOCKS_4},
    "int8": {"vision_encoder": TOKENS_8, "token_embedding": TABLE_8, "text_decoder": BLOCKS_8},
    "fp16": {"vision_encoder": HALF, "token_embedding": HALF, "text_decoder": HALF},
    "fp32": {"vision_encoder": PLAIN, "token_embedding": PLAIN, "text_decoder": PLAIN},
}


def _quantization(request: ExportRequest) -> dict[GraphName, GraphQuantization]:
    """The table's row, with the number of decoder matrices whose width the group does not divide."""
    row = dict(QUANTIZATION[request.precision])
    if request.onnx.int4_embedding:
        row["token_embedding"] = TABLE_4
    if request.recipe != RECIPES[request.precision]:
        return {name: _mixed(request, name) for name in row}
    decoder = with_fallbacks(row["text_decoder"], len(fallbacks(request.shapes, request.recipe)))
    return row | {"text_decoder": decoder}


def _mixed(request: ExportRequest, graph: GraphName) -> GraphQuantization:
    plan = request.plan("onnx")
    mine = {name: shape for name, shape in request.shapes.items() if graph_of(name, request.vlm) == graph}
    storages = [plan.storage(name, shape) for name, shape in mine.items()]
    return described(storages, QUANTIZATION[request.precision][graph].activations, CHANNEL_BLOCK)
