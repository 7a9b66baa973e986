"""Engine and model -> the three Core ML graphs before conversion: modules, examples, inputs, states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from bundle.manifest import CoreMl, Engine, Graph, GraphName, Precision, Tensor
from distill.models.mobilevlm import MobileVlm
from export.coreml.ane_modules import UNIT, AneDecoder, AneVision
from export.coreml.fill import MAIN
from export.coreml.layout import Layout
from export.coreml.modules import CoreMlDecoder, CoreMlEmbedding, CoreMlVision

FloatName = Literal["float16", "float32"]
# Dynamic sizes of the traced call; were they equal, or 1, the graph would hold them as one size, or as fixed.
TRACED_ROWS, TRACED_END = 4, 12
# Rows of a prompt that the Neural Engine takes at once: an image and a question are four calls.
PREFILL_ROWS = 64
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Function:
    """One entry point of a package.

    Attributes:
        rows: what a dimension of None in the graph's shapes stands for; None: any number.
    """

    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    rows: int | None = None


@dataclass(frozen=True)
class Part:
    """One graph before it is written.

    Attributes:
        layouts: parameter of the modules -> where it comes from, unless it is the weight of its own name.
        table_bytes: constants that are no weights: RoPE tables, masks.
    """

    graph: Graph
    functions: dict[str, Function]
    layouts: dict[str, Layout] = field(default_factory=dict)
    table_bytes: int = 0

    @property
    def sources(self) -> dict[str, Layout]:
        """``layouts`` with every parameter."""
        names = [name for name, _ in next(iter(self.functions.values())).module.named_parameters()]
        return {name: self.layouts.get(name, Layout(name)) for name in names}


@dataclass(frozen=True)
class Wanted:
    """What the graphs are made for.

    Attributes:
        vlm: may be hollow.
        context_length: tokens that image, prompt and answer take together.
    """

    vlm: MobileVlm
    precision: Precision
    context_length: int

    @property
    def float_name(self) -> FloatName:
        """What the programs compute in."""
        return "float32" if self.precision == "fp32" else "float16"

    @property
    def float_bytes(self) -> int:
        """Of a constant."""
        return 4 if self.precision == "fp32" else 2

    @property
    def cache_rows(self) -> int:
        """Rows of the Neural Engine's state."""
        return -(-self.context_length // UNIT) * UNIT

    @property
    def functions(self) -> dict[str, int]:
        """Entry points for the Neural Engine and the rows each takes; the last is the package's own choice."""
        return {PREFILL: min(PREFILL_ROWS, self.cache_rows), DECODE: 1}


def runner_notes(wanted: Wanted, engine: Engine) -> CoreMl:
    """The manifest's entry."""
    if engine == "gpu":
        return CoreMl(engine="gpu")
    parameters: Any = wanted.vlm.config.text_config.rope_parameters
    theta = float(parameters["rope_theta"])
    return CoreMl(engine="ane", functions=wanted.functions, rope_theta=theta)


def _vision(wanted: Wanted, module: CoreMlVision | AneVision) -> Part:
    config, dtype = wanted.vlm.config, wanted.float_name
    size: Any = config.vision_config.image_size
    graph = Graph(
        path="vision_encoder.mlpackage",
        inputs=(Tensor(name="pixel_values", dtype=dtype, shape=(1, 3, size, size)),),
        outputs=(
            Tensor(name="visual_tokens", dtype=dtype, shape=(1, config.visual_tokens, config.text_config.hidden_size)),
        ),
    )
    function = Function(module, (torch.rand(1, 3, size, size),))
    if isinstance(module, CoreMlVision):
        return Part(graph, {MAIN: function})
    return Part(graph, {MAIN: function}, module.layouts, module.key_mask.numel() * wanted.float_bytes)


def _gpu_vision(wanted: Wanted) -> Part:
    return _vision(wanted, CoreMlVision(wanted.vlm))


def _ane_vision(wanted: Wanted) -> Part:
    return _vision(wanted, AneVision(wanted.vlm))


def _embedding(wanted: Wanted, functions: dict[str, Function]) -> Part:
    width, dtype = wanted.vlm.config.text_config.hidden_size, wanted.float_name
    graph = Graph(
        path="token_embedding.mlpackage",
        inputs=(Tensor(name="input_ids", dtype="int32", shape=(1, None)),),
        outputs=(Tensor(name="embeddings", dtype=dtype, shape=(1, None, width)),),
    )
    return Part(graph, functions)


def _gpu_embedding(wanted: Wanted) -> Part:
    ids = torch.ones(1, TRACED_ROWS, dtype=torch.int32)
    return _embedding(wanted, {MAIN: Function(CoreMlEmbedding(wanted.vlm), (ids,))})


def _ane_embedding(wanted: Wanted) -> Part:
    module = CoreMlEmbedding(wanted.vlm)
    ids = {name: torch.ones(1, rows, dtype=torch.int32) for name, rows in wanted.functions.items()}
    return _embedding(wanted, {name: Function(module, (ids[name],), rows) for name, rows in wanted.functions.items()})


def _states(module: CoreMlDecoder | AneDecoder) -> tuple[Tensor, ...]:
    """Core ML has float16 states only, at fp32 too."""
    shape = tuple(module.k_cache.shape)
    return tuple(Tensor(name=name, dtype="float16", shape=shape) for name in ("k_cache", "v_cache"))


def _gpu_decoder(wanted: Wanted) -> Part:
    text, dtype = wanted.vlm.config.text_config, wanted.float_name
    module = CoreMlDecoder(wanted.vlm, wanted.context_length)
    graph = Graph(
        path="text_decoder.mlpackage",
        inputs=(
            Tensor(name="inputs_embeds", dtype=dtype, shape=(1, None, text.hidden_size)),
            Tensor(name="causal_mask", dtype=dtype, shape=(1, 1, None, None)),
        ),
        outputs=(Tensor(name="logits", dtype=dtype, shape=(1, 1, text.vocab_size)),),
        states=_states(module),
    )
    example = (torch.rand(1, TRACED_ROWS, text.hidden_size), torch.zeros(1, 1, TRACED_ROWS, TRACED_END))
    tables = 2 * module.cos.numel() * wanted.float_bytes
    return Part(graph, {MAIN: Function(module, example)}, table_bytes=tables)


def _ane_decoder(wanted: Wanted) -> Part:
    text, cache, dtype = wanted.vlm.config.text_config, wanted.cache_rows, wanted.float_name
    modules = {name: AneDecoder(wanted.vlm, cache, rows) for name, rows in wanted.functions.items()}
    module = modules[DECODE]
    graph = Graph(
        path="text_decoder.mlpackage",
        inputs=(
            Tensor(name="inputs_embeds", dtype=dtype, shape=(1, None, text.hidden_size)),
            Tensor(name="position", dtype="int32", shape=(1,)),
            Tensor(name="cos", dtype=dtype, shape=(1, 1, None, module.head_dim)),
            Tensor(name="sin", dtype=dtype, shape=(1, 1, None, module.head_dim)),
            Tensor(name="causal_mask", dtype=dtype, shape=(1, 1, None, cache)),
            Tensor(name="last_row", dtype=dtype, shape=(1, 1, 1, None)),
        ),
        outputs=(Tensor(name="logits", dtype=dtype, shape=(1, 1, text.vocab_size)),),
        states=_states(module),
    )
    functions = {
        name: Function(modules[name], tuple(_value(tensor, rows) for tensor in graph.inputs), rows)
        for name, rows in wanted.functions.items()
    }
    return Part(graph, functions, module.layouts)


def _value(tensor: Tensor, rows: int) -> torch.Tensor:
    shape = [rows if size is None else size for size in tensor.shape]
    return torch.zeros(shape, dtype=torch.int32) if tensor.dtype == "int32" else torch.rand(shape)


PARTS: dict[Engine, dict[GraphName, Callable[[Wanted], Part]]] = {
    "gpu": {"vision_encoder": _gpu_vision, "token_embedding": _gpu_embedding, "text_decoder": _gpu_decoder},
    "ane": {"vision_encoder": _ane_vision, "token_embedding": _ane_embedding, "text_decoder": _ane_decoder},
}


def with_rows(graph: Graph, rows: int | None) -> Graph:
    """The graph as one of its functions has it."""
    if rows is None:
        return graph

    def fixed(tensor: Tensor) -> Tensor:
        return tensor.model_copy(update={"shape": tuple(rows if size is None else size for size in tensor.shape)})

    return graph.model_copy(
        update={"inputs": tuple(map(fixed, graph.inputs)), "outputs": tuple(map(fixed, graph.outputs))}
    )
