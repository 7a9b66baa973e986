"""MobileVlm -> three Core AI assets (.aimodel, iOS 27) in the layout of Apple's VLM runner; the decoder has states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bundle.manifest import Graph, GraphName, GraphQuantization, Precision, Tensor
from export.contract import ExportedGraphs, ExportRequest
from export.coreai.convert import convert, load_converter, note_names
from export.coreai.modules import CoreAiDecoder, CoreAiEmbedding, CoreAiVision, with_weights
from export.coreai.weights import PackedWeight, pack, read_back
from export.coreml.to_coreml import describe
from export.weights.recipe import Storage

FloatName = Literal["float16", "float32"]
DTYPES: dict[FloatName, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
# Dynamic sizes of the traced call; were they equal, or 1, the graph would hold them as one size, or as fixed.
TRACED_ROWS, TRACED_END = 4, 12


@dataclass(frozen=True)
class Part:
    """One graph before it is written."""

    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    graph: Graph
    tables: tuple[str, ...] = ()  # buffers that are constants of the program: RoPE


def export_coreai(request: ExportRequest) -> ExportedGraphs:
    """Write the three assets under ``request.output`` and read their weights back.

    Raises:
        UsageError: coreai-torch is missing.
        VerificationError: a written asset is not what was asked for.
    """
    load_converter()
    graphs: dict[GraphName, Graph] = {}
    quantization: dict[GraphName, GraphQuantization] = {}
    dequantized: dict[str, torch.Tensor] = {}
    for name in PARTS:
        graphs[name], quantization[name], changed = export_graph(request, name)
        dequantized |= changed
        request.progress(f"{name.replace('_', ' ')} written: {graphs[name].path}")
    return ExportedGraphs(graphs, quantization, dequantized)


def export_graph(request: ExportRequest, name: GraphName) -> tuple[Graph, GraphQuantization, dict[str, torch.Tensor]]:
    """Write one asset; the last value holds the weights that differ from the checkpoint's."""
    part, dtype = PARTS[name](request), DTYPES[_float(request.precision)]
    weights = request.vlm.state_dict() if request.weights is None else request.weights
    plan = request.plan("coreai")
    rules: dict[str, Storage] = {}
    floats: dict[str, torch.Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    for weight, _ in part.module.named_parameters():
        value = weights[weight]
        rules[weight] = plan.storage(weight, tuple(value.shape))
        if rules[weight].bits < 16:
            packed[weight] = pack(value, rules[weight], dtype)
        else:
            floats[weight] = value.to(dtype)
    asset = request.output / part.graph.path
    twin = with_weights(part.module, floats, packed, dtype)
    convert(twin, part.example, part.graph, asset)
    tables = {table: twin.get_buffer(table) for table in part.tables}
    held, names = read_back(asset, {**floats, **tables}, packed)
    note_names(asset, names)
    changed: dict[str, torch.Tensor] = {}
    for weight in rules:
        value = torch.from_numpy(held[weight].reshape(weights[weight].shape))
        if not torch.equal(value, weights[weight].float()):
            changed[weight] = value
    sizes = {weight: weights[weight].numel() for weight in rules}
    return part.graph, _describe(name, request.precision, rules, sizes), changed


def _describe(
    name: GraphName, precision: Precision, rules: dict[str, Storage], sizes: dict[str, int]
) -> GraphQuantization:
    if precision == "fp32":
        return GraphQuantization(weights="float32", activations="float32")
    return describe(name, rules, sizes)


def _float(precision: Precision) -> FloatName:
    return "float32" if precision == "fp32" else "float16"


def _vision(request: ExportRequest) -> Part:
    config: Any = request.vlm.config
    size = config.vision_config.image_size
    features = (1, config.visual_tokens, config.text_config.hidden_size)
    graph = Graph(
        path="vision_encoder.aimodel",
        inputs=(Tensor(name="pixel_values", dtype="float32", shape=(1, 3, size, size)),),
        outputs=(Tensor(name="image_features", dtype=_float(request.precision), shape=features),),
    )
    return Part(CoreAiVision(request.vlm), (torch.zeros(1, 3, size, size),), graph)


def _embedding(request: ExportRequest) -> Part:
    width = request.vlm.config.text_config.hidden_size
    graph = Graph(
        path="token_embedding.aimodel",
        inputs=(Tensor(name="input_ids", dtype="int32", shape=(1, None)),),
        outputs=(Tensor(name="embeddings", dtype=_float(request.precision), shape=(1, None, width)),),
    )
    return Part(CoreAiEmbedding(request.vlm), (torch.ones(1, TRACED_ROWS, dtype=torch.int32),), graph)


def _decoder(request: ExportRequest) -> Part:
    text, dtype = request.vlm.config.text_config, _float(request.precision)
    module = CoreAiDecoder(request.vlm, request.context_length)
    cache = tuple(module.k_cache.shape)
    graph = Graph(
        path="text_decoder.aimodel",
        inputs=(
            Tensor(name="inputs_embeds", dtype=dtype, shape=(1, None, text.hidden_size)),
            Tensor(name="position_ids", dtype="int32", shape=(1, None)),
        ),
        outputs=(Tensor(name="logits", dtype=dtype, shape=(1, 1, text.vocab_size)),),
        states=tuple(Tensor(name=name, dtype=dtype, shape=cache) for name in ("k_cache", "v_cache")),
    )
    rows = torch.zeros(1, TRACED_ROWS, text.hidden_size, dtype=DTYPES[dtype])
    positions = torch.arange(TRACED_END, dtype=torch.int32)[None]
    return Part(module, (rows, positions), graph, tables=("cos", "sin"))


PARTS: dict[GraphName, Callable[[ExportRequest], Part]] = {
    "vision_encoder": _vision,
    "token_embedding": _embedding,
    "text_decoder": _decoder,
}
