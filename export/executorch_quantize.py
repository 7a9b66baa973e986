"""A MobileVlm and a recipe -> its matrix weights quantized in place, and a record of it for each graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bundle.manifest import GraphName, GraphQuantization
from distill.models.mobilevlm import MobileVlm
from export.quantize.chosen import ChosenWeights
from export.recipe import Recipe, Storage, storage_of

EMBEDDING = "language_model.embed_tokens"
DECODER = ("language_model.layers.", "lm_head")
VISION = ("vision_tower.", "projector.")
DYNAMIC = "int8 dynamic per token"
INT4: torch.dtype = vars(torch)["int4"]  # torch defines its sub-byte types at run time, out of mypy's sight


class HalfLinear(nn.Module):
    """A linear layer whose weights and product are float16 between float32 neighbours."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.weight.half(), requires_grad=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.half(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows.half(), self.weight, self.bias).float()


def quantize(vlm: MobileVlm, recipe: Recipe, chosen: ChosenWeights | None = None) -> dict[GraphName, GraphQuantization]:
    """Quantize the linear layers and the embedding table of ``vlm`` in place; convolutions and norms stay float32.

    Args:
        chosen: weights whose codes are stored as they are; ``vlm`` holds what they stand for.
    """
    if recipe.precision == "fp32":
        whole = GraphQuantization(weights="float32", activations="float32")
        return {"vision_encoder": whole, "token_embedding": whole, "text_decoder": whole}
    if recipe.precision == "fp16":
        return _to_half(vlm)
    return _to_integers(vlm, recipe, chosen)


def dequantized(vlm: MobileVlm, original: MobileVlm) -> dict[str, torch.Tensor]:
    """float32 values of every weight of ``vlm`` that quantization or rounding replaced, by state-dict name."""
    from torchao.utils import TorchAOBaseTensor

    before = dict(original.named_parameters())
    changed = {name: weight for name, weight in vlm.named_parameters() if weight is not before[name]}
    return {
        name: (weight.dequantize() if isinstance(weight, TorchAOBaseTensor) else weight.detach()).float()
        for name, weight in changed.items()
    }


def _to_half(vlm: MobileVlm) -> dict[GraphName, GraphQuantization]:
    for name, module in list(vlm.named_modules()):
        if isinstance(module, nn.Linear):
            vlm.set_submodule(name, HalfLinear(module))
    table = vlm.language_model.embed_tokens
    table.weight = nn.Parameter(table.weight.half(), requires_grad=False)
    linear = GraphQuantization(weights="float16", activations="float16 in linear layers, float32 elsewhere")
    lookup = GraphQuantization(weights="float16", activations="float32")
    return {"vision_encoder": linear, "token_embedding": lookup, "text_decoder": linear}


def _to_integers(vlm: MobileVlm, recipe: Recipe, chosen: ChosenWeights | None) -> dict[GraphName, GraphQuantization]:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    storages = {
        name: storage_of(f"{name}.weight", tuple(module.weight.shape), recipe)
        for name, module in vlm.named_modules()
        if isinstance(module, nn.Linear) and name.startswith((*DECODER, *VISION))
    }

    def stored_as(storage: Storage) -> Callable[[nn.Module, str], bool]:
        return lambda _module, name: storages.get(name) == storage

    for storage in sorted({storage for storage in storages.values() if storage.bits == 4}, key=repr):
        assert storage.group_size is not None
        # XNNPACK stores group scales as bfloat16; rounded first, the codes are chosen for the scales that are stored
        four = Int8DynamicActivationIntxWeightConfig(
            INT4, PerGroup(storage.group_size), weight_scale_dtype=torch.bfloat16
        )
        quantize_(vlm, four, stored_as(storage))
    quantize_(vlm, Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)), stored_as(Storage(8, None)))
    for name in (name for name, storage in storages.items() if storage.bits == 4):
        weight: Any = vlm.get_parameter(f"{name}.weight")
        weight.scale = weight.scale.float()  # the values stay bfloat16's; the operator wants the type
        if chosen is not None and f"{name}.weight" in chosen:
            coded = chosen.coded(f"{name}.weight")
            weight.qdata, weight.scale = coded.codes, coded.scales
    quantize_(vlm, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), lambda module, name: name == EMBEDDING)
    tower = {name: storage for name, storage in storages.items() if name.startswith(VISION)}
    decoder = {name: storage for name, storage in storages.items() if name.startswith(DECODER)}
    return {
        "vision_encoder": _record(tower),
        "token_embedding": GraphQuantization(weights="int8 symmetric", activations="float32"),
        "text_decoder": _record(decoder),
    }


def _record(storages: Mapping[str, Storage]) -> GraphQuantization:
    """The manifest's line on one graph: how most of its linear layers are stored, then the others by their names."""
    kinds = Counter(storages.values())
    main = max(kinds, key=lambda storage: kinds[storage])
    others = "".join(f"; {_weights(kind)}: {_layers(storages, kind)}" for kind in kinds if kind != main)
    activations = "float32" if main.bits == 32 else DYNAMIC
    return GraphQuantization(weights=_weights(main) + others, group_size=main.group_size, activations=activations)


def _layers(storages: Mapping[str, Storage], kind: Storage) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name, storage in storages.items() if storage == kind}))


def _weights(storage: Storage) -> str:
    return "float32" if storage.bits == 32 else f"int{storage.bits} symmetric"
