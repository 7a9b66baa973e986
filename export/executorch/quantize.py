"""Weights by name, and how to store them -> the modules of one graph filled, each weight in the form its kernel takes.

Weights are read, quantized and let go one at a time, so that the model is never whole as float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bundle.manifest import GraphName
from distill.models.mobilevlm import MobileVlm
from export.executorch.stored import Stored, StoredHalves, StoredIntegers, half_bytes, integer_bytes, key_of
from export.job.meter import Meter
from export.model.graph_weights import EMBEDDING, UNREAD_PARTS, graph_of
from export.weights.lazy import LazyWeights, read_weight
from export.weights.plan import StoragePlan
from export.weights.recipe import Storage

SMALLEST_GROUP = 32  # XNNPACK takes groups of a multiple of it, and only at 4 bits
INT4: torch.dtype = vars(torch)["int4"]  # torch defines its sub-byte types at run time, out of mypy's sight


class HalfLinear(nn.Module):
    """A linear layer whose weights and product are float16 between float32 neighbours."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.weight.half(), requires_grad=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.half(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows.half(), self.weight, self.bias).float()


@dataclass(frozen=True)
class WeightSource:
    """The model's weights by their state-dict names, lazy or not, and how each is stored.

    Attributes:
        dynamic: matrices are multiplied as XNNPACK does it: activations rounded to int8 per token where the weights are
            integers, to float16 where they are halves. Else the graph multiplies in float and its backend, which has
            one type for all, rounds as it likes.
    """

    weights: Mapping[str, torch.Tensor]
    plan: StoragePlan
    meter: Meter
    dynamic: bool = True


def empty_twin(vlm: MobileVlm) -> MobileVlm:
    """A second module tree of the same shapes without values, and without the tower layers that nobody reads.

    Rotary frequencies, which no checkpoint stores, are shared.
    """
    with torch.device("meta"):
        twin = MobileVlm(vlm.config)
    tower = twin.vision_tower
    tower.encoder.layers = tower.encoder.layers[: twin.config.tower_layers]
    for unread in UNREAD_PARTS & dict(tower.named_children()).keys():
        delattr(tower, unread)
    twin.language_model.rotary_emb = vlm.language_model.rotary_emb
    return twin.eval()


def fill(twin: MobileVlm, graph: GraphName, source: WeightSource) -> dict[str, Stored]:
    """Give the modules of one graph their weights -> what of them the file will hold in another form than float32."""
    if source.plan.precision == "fp16" and source.dynamic:
        for name, module in list(twin.named_modules()):
            if isinstance(module, nn.Linear):
                twin.set_submodule(name, HalfLinear(module))
    stored: dict[str, Stored] = {}
    for path, module in twin.named_modules():
        for part, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{part}"
            if graph_of(name, twin) == graph:
                weight, record = _stored_form(module, name, parameter, source)
                setattr(module, part, nn.Parameter(weight, requires_grad=False))
                stored |= {} if record is None else {name: record}
                source.meter.advance(math.prod(parameter.shape))
    return stored


def _stored_form(
    module: nn.Module, name: str, parameter: nn.Parameter, source: WeightSource
) -> tuple[torch.Tensor, Stored | None]:
    """One weight as the module computes with it, and where the file will have it; None where it stays float32."""
    value = torch.empty(parameter.shape)
    read_weight(source.weights, name, value)
    storage = source.plan.storage(name, tuple(value.shape))
    matrix = isinstance(module, nn.Linear) or name == EMBEDDING  # not the table of positions
    if isinstance(module, HalfLinear) or (matrix and storage.bits == 16):
        half = value.half()
        kept = half if source.dynamic else half.float()
        return kept, StoredHalves(key=key_of(half_bytes(half)), shape=tuple(half.shape))
    if not matrix or storage.bits in (16, 32):  # convolutions stay float32 at every precision
        return value, None
    packed = _codes(source.plan, name, value, storage, dynamic=source.dynamic and isinstance(module, nn.Linear))
    levels, scales = integer_bytes(packed.qdata, packed.scale, storage)
    record = StoredIntegers(
        key=key_of(levels),
        scales=key_of(scales),
        shape=tuple(value.shape),
        bits=4 if storage.bits == 4 else 8,
        group_size=storage.group_size,
    )
    return packed, record


def _codes(plan: StoragePlan, name: str, weight: torch.Tensor, storage: Storage, dynamic: bool) -> Any:
    """The integers of one weight: those that were chosen for it, or the nearest."""
    packed = integers(weight, storage, dynamic)
    if plan.chosen is not None and name in plan.chosen:
        coded = plan.chosen.coded(name)
        packed.qdata, packed.scale = coded.codes, coded.scales
    return packed


def integers(weight: torch.Tensor, storage: Storage, dynamic: bool) -> Any:
    """A matrix [N, K] -> torchao's tensor of its integer levels and scales.

    Args:
        dynamic: round the activations that it is multiplied with to int8, per token; else it is a table.
    """
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    if storage.bits == 4 and storage.group_size is not None:
        # XNNPACK stores group scales as bfloat16; rounded first, the codes are chosen for the scales that are stored
        config: Any = Int8DynamicActivationIntxWeightConfig(
            INT4, PerGroup(storage.group_size), weight_scale_dtype=torch.bfloat16
        )
    elif dynamic:
        config = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    else:
        config = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    quantize_(holder, config)
    packed: Any = holder.weight.data
    packed.scale = packed.scale.float()  # the values stay bfloat16's; the operator wants the type
    return packed


class QuantizedAgain(LazyWeights):
    """State-dict name -> the float32 values of its integers, made anew: of files whose weights cannot be read back."""

    def __init__(self, source: WeightSource, stored: Mapping[str, Stored]) -> None:
        self._source, self._stored = source, stored

    def __getitem__(self, name: str) -> torch.Tensor:
        out = torch.empty(self._stored[name].shape)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        read_weight(self._source.weights, name, out)
        record = self._stored[name]
        if isinstance(record, StoredHalves):
            out.copy_(out.half())
        else:
            storage = Storage(record.bits, record.group_size)
            out.copy_(_codes(self._source.plan, name, out, storage, dynamic=True).dequantize())

    def __iter__(self) -> Any:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
