"""A MobileVlm and a precision -> its matrix weights quantized in place, and a record of it for each graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bundle.manifest import GraphName, GraphQuantization, Precision
from distill.models.mobilevlm import MobileVlm

GROUP_SIZE = 32  # XNNPACK's smallest group: the best accuracy it has (a multiple of 32 is required)
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


def quantize(vlm: MobileVlm, precision: Precision) -> dict[GraphName, GraphQuantization]:
    """Quantize the linear layers and the embedding table of ``vlm`` in place; convolutions and norms stay float32."""
    if precision == "fp32":
        whole = GraphQuantization(weights="float32", activations="float32")
        return {"vision_encoder": whole, "token_embedding": whole, "text_decoder": whole}
    if precision == "fp16":
        return _to_half(vlm)
    return _to_integers(vlm, grouped=precision == "int4")


def dequantized(vlm: MobileVlm, original: MobileVlm) -> dict[str, torch.Tensor]:
    """float32 values of every weight of ``vlm`` that quantization or rounding replaced, by state-dict name."""
    from torchao.utils import TorchAOBaseTensor

    before = dict(original.named_parameters(remove_duplicate=False))  # a tied head has two names
    changed = {name: w for name, w in vlm.named_parameters(remove_duplicate=False) if w is not before[name]}
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


def _to_integers(vlm: MobileVlm, grouped: bool) -> dict[GraphName, GraphQuantization]:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    def fits(module: nn.Module, name: str) -> bool:
        return (
            grouped
            and isinstance(module, nn.Linear)
            and name.startswith(DECODER)
            and module.in_features % GROUP_SIZE == 0
        )

    def others(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith((*DECODER, *VISION)) and not fits(module, name)

    in_groups = [name for name, module in vlm.named_modules() if fits(module, name)]
    by_channel = [name for name, module in vlm.named_modules() if others(module, name) and name.startswith(DECODER)]
    # XNNPACK stores group scales as bfloat16; rounded first, the codes are chosen for the scales that are stored
    four = Int8DynamicActivationIntxWeightConfig(INT4, PerGroup(GROUP_SIZE), weight_scale_dtype=torch.bfloat16)
    eight = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    quantize_(vlm, eight, others)
    quantize_(vlm, four, fits)
    for name in in_groups:
        weight: Any = vlm.get_parameter(f"{name}.weight")
        weight.scale = weight.scale.float()  # the values stay bfloat16's; the operator wants the type
    quantize_(vlm, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), lambda module, name: name == EMBEDDING)
    channelwise = GraphQuantization(weights="int8 symmetric", activations=DYNAMIC)
    return {
        "vision_encoder": channelwise,
        "token_embedding": GraphQuantization(weights="int8 symmetric", activations="float32"),
        "text_decoder": _decoder_record(by_channel) if in_groups else channelwise,
    }


def _decoder_record(by_channel: list[str]) -> GraphQuantization:
    layers = sorted({name.rsplit(".", 1)[-1] for name in by_channel})
    fallback = (
        f"; int8 symmetric per channel where {GROUP_SIZE} does not divide the width: {', '.join(layers)}"
        if layers
        else ""
    )
    return GraphQuantization(weights="int4 symmetric" + fallback, group_size=GROUP_SIZE, activations=DYNAMIC)
