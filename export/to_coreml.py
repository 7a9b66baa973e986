"""MobileVlm -> three iOS 18 ML programs (.mlpackage); the decoder keeps its KV cache as state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bundle.manifest import Graph, GraphName, GraphQuantization, Precision, Tensor
from export.contract import ExportedGraphs, ExportRequest
from export.coreml_checks import Budget, check_package
from export.coreml_codes import store_codes
from export.coreml_convert import convert, load_coremltools, quantize, save_package
from export.coreml_modules import CoreMlDecoder, CoreMlEmbedding, CoreMlVision, refuse_unsupported
from export.coreml_weights import flat_name, read_back
from export.recipe import Recipe, Storage, storage_of

FloatName = Literal["float16", "float32"]
# Dynamic sizes of the traced call; were they equal, or 1, the graph would hold them as one size, or as fixed.
TRACED_ROWS, TRACED_END = 4, 12


@dataclass(frozen=True)
class Part:
    """One graph before it is written."""

    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    graph: Graph
    table_bytes: int = 0  # constants that are no weights: RoPE


def export_coreml(request: ExportRequest) -> ExportedGraphs:
    """Write the three packages under ``request.output``, check them, and read their weights back.

    Raises:
        UsageError: coremltools is missing, or the model has a part that the decoder does not compute.
        VerificationError: a written package is not what was asked for.
    """
    graphs: dict[GraphName, Graph] = {}
    quantization: dict[GraphName, GraphQuantization] = {}
    dequantized: dict[str, torch.Tensor] = {}
    for name in PARTS:
        graphs[name], quantization[name], changed = export_graph(request, name)
        dequantized |= changed
        request.progress(f"{name.replace('_', ' ')} written: {graphs[name].path}")
    return ExportedGraphs(graphs, quantization, dequantized)


def export_graph(request: ExportRequest, name: GraphName) -> tuple[Graph, GraphQuantization, dict[str, torch.Tensor]]:
    """Write one of the three packages; the last value holds the weights that differ from the checkpoint's.

    Raises:
        UsageError, VerificationError: as ``export_coreml``.
    """
    refuse_unsupported(request.vlm)
    load_coremltools()
    weights = request.vlm.state_dict()
    part = PARTS[name](request)
    rules = {weight: _storage(weight, weights[weight], request.recipe) for weight, _ in part.module.named_parameters()}
    values = _write(request, part, {weight: weights[weight] for weight in rules}, rules)
    changed = {weight: value for weight, value in values.items() if not torch.equal(value, weights[weight])}
    return part.graph, describe(name, rules, _sizes(values)), changed


def _storage(name: str, weight: torch.Tensor, recipe: Recipe) -> Storage:
    """The shared recipe's answer; what it leaves in float is float16, as the program computes, except at fp32."""
    rule = storage_of(name, tuple(weight.shape), recipe)
    return Storage(16, None) if rule.bits == 32 and recipe.precision != "fp32" else rule


def _write(
    request: ExportRequest, part: Part, weights: Mapping[str, torch.Tensor], rules: Mapping[str, Storage]
) -> dict[str, torch.Tensor]:
    """Write and check one package -> the weights it holds."""
    package, longest = request.output / part.graph.path, request.context_length
    model = convert(part.module, part.example, part.graph, request.precision, longest)
    constants = {name: f"{flat_name(name)}_to_fp16" for name, rule in rules.items() if rule.bits < 16}
    chosen = request.chosen
    coded = {name: constant for name, constant in constants.items() if chosen is not None and name in chosen}
    if chosen is not None:
        model = store_codes(model, chosen, coded)
    quantized = {constant: rules[name] for name, constant in constants.items() if name not in coded}
    save_package(quantize(model, quantized), package)
    bits = {name: int(rule.bits) for name, rule in rules.items()}
    values = read_back(package, weights, bits)
    check_package(
        package, part.graph, longest, Budget(bits, _sizes(weights), part.table_bytes + _spare(weights, rules))
    )
    return values


def _sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: weight.numel() for name, weight in weights.items()}


def _spare(weights: Mapping[str, torch.Tensor], rules: Mapping[str, Storage]) -> int:
    """Bytes of scales (float16 per group or channel) and of the zero bias that each linear gets."""
    groups = sum(
        weight.numel() // (rules[name].group_size or weight[0].numel())
        for name, weight in weights.items()
        if weight.ndim > 1
    )
    biases = sum(weight.shape[0] for weight in weights.values() if weight.ndim > 1)
    return 2 * groups + 4 * biases


def _float(precision: Precision) -> FloatName:
    return "float32" if precision == "fp32" else "float16"


def _vision(request: ExportRequest) -> Part:
    config, dtype = request.vlm.config, _float(request.precision)
    size: Any = config.vision_config.image_size
    graph = Graph(
        path="vision_encoder.mlpackage",
        inputs=(Tensor(name="pixel_values", dtype=dtype, shape=(1, 3, size, size)),),
        outputs=(
            Tensor(name="visual_tokens", dtype=dtype, shape=(1, config.visual_tokens, config.text_config.hidden_size)),
        ),
    )
    return Part(CoreMlVision(request.vlm), (torch.rand(1, 3, size, size),), graph)


def _embedding(request: ExportRequest) -> Part:
    width, dtype = request.vlm.config.text_config.hidden_size, _float(request.precision)
    graph = Graph(
        path="token_embedding.mlpackage",
        inputs=(Tensor(name="input_ids", dtype="int32", shape=(1, None)),),
        outputs=(Tensor(name="embeddings", dtype=dtype, shape=(1, None, width)),),
    )
    ids = torch.ones(1, TRACED_ROWS, dtype=torch.int32)
    return Part(CoreMlEmbedding(request.vlm), (ids,), graph)


def _decoder(request: ExportRequest) -> Part:
    text, dtype = request.vlm.config.text_config, _float(request.precision)
    module = CoreMlDecoder(request.vlm, request.context_length)
    cache = tuple(module.k_cache.shape)
    graph = Graph(
        path="text_decoder.mlpackage",
        inputs=(
            Tensor(name="inputs_embeds", dtype=dtype, shape=(1, None, text.hidden_size)),
            Tensor(name="causal_mask", dtype=dtype, shape=(1, 1, None, None)),
        ),
        outputs=(Tensor(name="logits", dtype=dtype, shape=(1, 1, text.vocab_size)),),
        # Core ML has float16 states only, at fp32 too
        states=tuple(Tensor(name=name, dtype="float16", shape=cache) for name in ("k_cache", "v_cache")),
    )
    example = (torch.rand(1, TRACED_ROWS, text.hidden_size), torch.zeros(1, 1, TRACED_ROWS, TRACED_END))
    tables = 2 * module.cos.numel() * (4 if dtype == "float32" else 2)
    return Part(module, example, graph, tables)


PARTS: dict[GraphName, Callable[[ExportRequest], Part]] = {
    "vision_encoder": _vision,
    "token_embedding": _embedding,
    "text_decoder": _decoder,
}


def describe(name: GraphName, rules: Mapping[str, Storage], sizes: Mapping[str, int]) -> GraphQuantization:
    """The manifest's line on one graph: the rule of most quantized weights, then the names under another one.

    Norms, biases, position and patch embeddings stay in float and are not named.
    """
    shares: dict[Storage, int] = {}
    for weight, rule in rules.items():
        shares[rule] = shares.get(rule, 0) + sizes[weight]
    quantized = [rule for rule in shares if rule.bits < 16]
    main = max(quantized or shares, key=lambda rule: shares[rule])
    others = [f"{_names(rules, rule)} {_weights(rule)} per channel" for rule in quantized if rule != main]
    activations = "float32" if main.bits == 32 else "float16"
    if main.bits == 32 and name == "text_decoder":
        activations += ", KV cache float16"
    return GraphQuantization(
        weights=", ".join([_weights(main), *others]), group_size=main.group_size, activations=activations
    )


def _weights(rule: Storage) -> str:
    return f"int{rule.bits} symmetric" if rule.bits < 16 else f"float{rule.bits}"


def _names(rules: Mapping[str, Storage], rule: Storage) -> str:
    return " and ".join(
        sorted({name.removesuffix(".weight").split(".")[-1] for name, found in rules.items() if found == rule})
    )
