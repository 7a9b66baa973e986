"""A model and a precision -> model.pte: three methods on XNNPACK, as ExecuTorch's own multimodal runner wants them.

One file, not one a graph: the stock runners of the phones (LlmModule on Android, MultimodalRunner on iOS) open one .pte
with all methods and drop data files beside it, and the graphs share no weights. They are lowered one by one
nevertheless and joined (executorch_merge.py), so that one graph at a time is in memory.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bundle.manifest import Graph, GraphName, GraphQuantization, Precision, Tensor
from export.contract import ExportedGraphs, ExportRequest
from export.executorch.lower import backend_of, load_operators, lower, partitioners_of, traced
from export.executorch.merge import merge
from export.executorch.modules import TextDecoder, TokenEmbedding, VisionEncoder
from export.executorch.quantize import QuantizedAgain, WeightSource, empty_twin, fill
from export.executorch.stored import Stored, StoredWeights
from export.job.meter import Meter, waiting
from export.job.room import release_free_memory
from export.model.graph_weights import graph_of
from export.model.shape import model_shape
from export.weights.described import described, with_fallbacks
from export.weights.lazy import Layered, LazyWeights
from export.weights.recipe import RECIPES, fallbacks

FILE = "model.pte"
GRAPHS: tuple[GraphName, ...] = ("token_embedding", "vision_encoder", "text_decoder")
LOWERING_PER_TRACING = 20  # times longer, at 1.7B
STORED = TypeAdapter(dict[str, Stored])


def export_executorch(request: ExportRequest) -> ExportedGraphs:
    """Write ``model.pte`` into the request's output folder.

    Raises:
        UsageError: executorch or torchao is not installed.
        VerificationError: the file does not hold the weights that were quantized.
    """
    load_operators()
    whole = request.output / FILE
    finished = _finished_before(request)
    stored = {name: record for note in finished.values() for name, record in note["stored"].items()}
    if not any(note["file"] == FILE for note in finished.values()):
        for name in GRAPHS:
            if name not in finished:
                stored |= write_part(request, name)
        merge([request.output / _part(name) for name in GRAPHS], whole)
    if [note["file"] for note in finished.values()] != [FILE] * len(GRAPHS):  # or a kill between two of these notes
        for name in GRAPHS:
            own = {key: record for key, record in stored.items() if graph_of(key, request.vlm) == name}
            _finish(request, name, FILE, own)
        for name in GRAPHS:
            (request.output / _part(name)).unlink(missing_ok=True)
        request.progress(f"{FILE} written")
    return ExportedGraphs(_graphs(request), _quantization(request), _held(request, whole, stored))


def _held(request: ExportRequest, file: Path, stored: dict[str, Stored]) -> LazyWeights:
    """Weights of graphs on XNNPACK as the file holds them; of others, whose data is the backend's own, made anew."""
    ours = {name for name in stored if _is_readable(request, graph_of(name, request.vlm))}
    read = StoredWeights(file, {name: stored[name] for name in ours})
    others = {name: record for name, record in stored.items() if name not in ours}
    if not others:
        return read
    return Layered(read, QuantizedAgain(source_of(request, "vision_encoder"), others))


def _is_readable(request: ExportRequest, graph: GraphName | None) -> bool:
    return graph is not None and backend_of(graph, request.executorch.backend) in (None, "xnnpack")


def write_part(request: ExportRequest, name: GraphName) -> dict[str, Stored]:
    """Quantize, trace and lower one graph into a .pte of its own -> what it holds."""
    source = source_of(request, name)
    said = name.replace("_", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and executorch warn of their own deprecated calls, hundreds of times
        twin = empty_twin(request.vlm)
        stored = fill(twin, name, source)
        request.progress(f"{said}: weights at {request.precision}")
        start = time.monotonic()
        program = traced(_module(twin, name, request.context_length), _sizes(request)[1])
        del twin
        request.progress(f"{said}: traced, {len(program.graph.nodes)} operators")
        constants = _constants(request) if name == "token_embedding" else {}
        partitioners = partitioners_of(backend_of(name, request.executorch.backend), request.precision)
        with waiting(f"{said}: lowering", LOWERING_PER_TRACING * (time.monotonic() - start), request.progress):
            lower(name, program, constants, partitioners, request.output / _part(name))
    del program
    gc.collect()  # graphs refer to themselves
    release_free_memory()
    request.progress(f"{said}: lowered to {backend_of(name, request.executorch.backend) or 'plain kernels'}")
    _finish(request, name, _part(name), stored)
    return stored


def _part(name: GraphName) -> str:
    return f"{name}.part.pte"


def source_of(request: ExportRequest, name: GraphName) -> WeightSource:
    """The weights of one graph, and how they are stored."""
    vlm = request.vlm
    values = sum(math.prod(shape) for key, shape in request.shapes.items() if graph_of(key, vlm) == name)
    return WeightSource(
        weights=vlm.state_dict() if request.weights is None else request.weights,
        plan=request.plan("executorch"),
        dynamic=_is_readable(request, name),
        meter=Meter(f"{name.replace('_', ' ')}: weights quantized", values, request.progress),
    )


def _module(twin: Any, name: GraphName, context_length: int) -> VisionEncoder | TokenEmbedding | TextDecoder:
    if name == "vision_encoder":
        return VisionEncoder(twin)
    return (TokenEmbedding if name == "token_embedding" else TextDecoder)(twin, context_length)


def _finish(request: ExportRequest, name: GraphName, file: str, stored: dict[str, Stored]) -> None:
    if request.work is not None:
        note = {"file": file, "stored": STORED.dump_python(stored, mode="json")}
        request.work.finish(name, [request.output / file], note)


def _finished_before(request: ExportRequest) -> dict[GraphName, dict[str, Any]]:
    """What a run that was killed left behind."""
    notes: dict[GraphName, dict[str, Any]] = {}
    for name in GRAPHS:
        note = None if request.work is None else request.work.finished(name)
        if note is not None:
            notes[name] = {"file": note["file"], "stored": STORED.validate_python(note["stored"])}
            request.progress(f"{name.replace('_', ' ')} is whole from the run before")
    return notes


def _constants(request: ExportRequest) -> dict[str, int | bool | list[int]]:
    """The constant methods that ExecuTorch 1.4's runners read (extension/llm/runner/constants.h)."""
    text = request.vlm.config.text_config
    # runners put it first when they are asked to
    bos: dict[str, int | bool | list[int]] = {} if request.bos_id is None else {"get_bos_id": request.bos_id}
    return bos | {
        "get_max_seq_len": request.context_length - 1,
        "get_max_context_len": request.context_length,
        "get_vocab_size": text.vocab_size,
        "get_eos_ids": list(request.eos_ids),
        "get_n_layers": text.num_hidden_layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


DYNAMIC = "int8 dynamic per token"
PLAIN = GraphQuantization(weights="float32", activations="float32")
HALF = GraphQuantization(weights="float16", activations="float16 in linear layers, float32 elsewhere")
HALF_TABLE = GraphQuantization(weights="float16", activations="float32")
CHANNELS = GraphQuantization(weights="int8 symmetric", activations=DYNAMIC)
TABLE = GraphQuantization(weights="int8 symmetric", activations="float32")
GROUPS = GraphQuantization(weights="int4 symmetric, lm_head int8", group_size=32, activations=DYNAMIC)
QUANTIZATION: dict[Precision, dict[GraphName, GraphQuantization]] = {
    "int4": {"vision_encoder": CHANNELS, "token_embedding": TABLE, "text_decoder": GROUPS},
    "int8": {"vision_encoder": CHANNELS, "token_embedding": TABLE, "text_decoder": CHANNELS},
    "fp16": {"vision_encoder": HALF, "token_embedding": HALF_TABLE, "text_decoder": HALF},
    "fp32": {"vision_encoder": PLAIN, "token_embedding": PLAIN, "text_decoder": PLAIN},
}


def _quantization(request: ExportRequest) -> dict[GraphName, GraphQuantization]:
    """The table's row, with the number of decoder matrices whose width the group does not divide."""
    row = QUANTIZATION[request.precision] | {"vision_encoder": _vision(request)}
    if request.recipe != RECIPES[request.precision]:
        return {name: _mixed(request, name, row[name].activations) for name in row}
    decoder = with_fallbacks(row["text_decoder"], len(fallbacks(request.shapes, request.recipe)))
    return row | {"text_decoder": decoder}


def _mixed(request: ExportRequest, graph: GraphName, activations: str) -> GraphQuantization:
    plan = request.plan("executorch")
    mine = {name: shape for name, shape in request.shapes.items() if graph_of(name, request.vlm) == graph}
    return described([plan.storage(name, shape) for name, shape in mine.items()], activations)


def _vision(request: ExportRequest) -> GraphQuantization:
    backend, precision = request.executorch.backend, request.precision
    if precision == "fp32" or request.executorch.float_vision:
        return PLAIN
    if backend == "xnnpack":
        return QUANTIZATION[precision]["vision_encoder"]
    if backend == "coreml" and precision != "fp16":
        return GraphQuantization(weights="int8 symmetric", activations="float16")
    return GraphQuantization(weights="float16", activations="float16")


def _sizes(request: ExportRequest) -> tuple[Any, Any]:
    """The decoder's config and the image size; transformers types the fields of both as unions."""
    return request.vlm.config.text_config, request.vlm.config.vision_config.image_size


def _graphs(request: ExportRequest) -> dict[GraphName, Graph]:
    text, size = _sizes(request)
    shape = model_shape(request.vlm, request.context_length)
    width, cache = text.hidden_size, (1, request.context_length, shape.num_kv_heads, shape.head_dim)
    return {
        "vision_encoder": Graph(
            path=FILE,
            method="vision_encoder",
            backend=backend_of("vision_encoder", request.executorch.backend),
            inputs=(Tensor(name="pixel_values", dtype="float32", shape=(1, 3, size, size)),),
            outputs=(
                Tensor(name="visual_tokens", dtype="float32", shape=(1, request.vlm.config.visual_tokens, width)),
            ),
        ),
        "token_embedding": Graph(
            path=FILE,
            method="token_embedding",
            backend=backend_of("token_embedding", request.executorch.backend),
            inputs=(Tensor(name="input_ids", dtype="int64", shape=(1, None)),),
            outputs=(Tensor(name="embeddings", dtype="float32", shape=(1, None, width)),),
        ),
        "text_decoder": Graph(
            path=FILE,
            method="text_decoder",
            backend=backend_of("text_decoder", request.executorch.backend),
            inputs=(
                Tensor(name="inputs_embeds", dtype="float32", shape=(1, None, width)),
                Tensor(name="start_position", dtype="int64", shape=(1,)),
            ),
            outputs=(Tensor(name="logits", dtype="float32", shape=(1, text.vocab_size)),),
            states=tuple(
                Tensor(name=f"layers.{layer}.{name}", dtype="float32", shape=cache)
                for layer in range(text.num_hidden_layers)
                for name in ("k_cache", "v_cache")
            ),
        ),
    }
