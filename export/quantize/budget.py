"""Losses of the parts and a budget in MB -> the bits of each part: where a megabyte buys most, it is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bundle.errors import UsageError
from bundle.manifest import Target
from export.quantize.parts import EIGHT_BITS_ONLY, Part, recipe_of
from export.quantize.sensitivity import Loss
from export.weights.recipe import Bits, Recipe, storage_of

MB = 10**6
SCALE_BYTES: dict[Target, int] = {"onnx": 4, "executorch": 2, "coreml": 2, "coreai": 2}
CHANNEL_BLOCK = 128  # ONNX stores a scale for each so many values at 8 bits, the others one for each row
Shapes = Mapping[str, tuple[int, ...]]


def weight_bytes(shapes: Shapes, recipe: Recipe, target: Target) -> int:
    """Bytes that the weights of these names take in the target's files, scales counted."""
    return sum(_bytes(name, shape, recipe, target) for name, shape in shapes.items())


def _bytes(name: str, shape: tuple[int, ...], recipe: Recipe, target: Target) -> int:
    storage, values = storage_of(name, shape, recipe), math.prod(shape)
    if storage.bits == 32:
        return values * (2 if target in ("coreml", "coreai") else 4)  # these write what is left in float as float16
    if storage.bits == 16:
        return values * 2
    group = storage.group_size or (CHANNEL_BLOCK if target == "onnx" else shape[-1])
    return values * storage.bits // 8 + -(-values // group) * SCALE_BYTES[target]


def price_bytes(part: Part, shapes: Shapes, target: Target) -> int:
    """What the part takes at 8 bits more than at 4."""
    mine = {name: shapes[name] for name in part.weights}
    wide, narrow = (weight_bytes(mine, recipe_of("", [(part, bits)]), target) for bits in (8, 4))
    return wide - narrow


def choose_bits(
    parts: Sequence[Part],
    losses: Mapping[str, Mapping[Bits, Loss]],
    shapes: Shapes,
    target: Target,
    budget_bytes: int,
) -> dict[str, Bits]:
    """Part's name -> 4 or 8.

    All parts begin at 4 bits. They are raised to 8 in the order of divergence saved per byte, each that still fits: the
    losses of single parts are taken to add up. That order is the best for a budget that it happens to use up, and is
    short of the best choice by less than what one part saves otherwise.

    Raises:
        UsageError: not even the smallest choice fits.
    """
    bits: dict[str, Bits] = {part.name: 8 if part.pattern in EIGHT_BITS_ONLY[target] else 4 for part in parts}
    smallest = weight_bytes(shapes, recipe_of("", [(part, bits[part.name]) for part in parts]), target)
    left = budget_bytes - smallest
    if left < 0:
        raise UsageError(
            f"--budget-mb {budget_bytes / MB:g} is too little: with every part at 4 bits that --target {target} takes "
            f"so, the weights are {smallest / MB:.2f} MB; give at least that"
        )

    def gain(part: Part) -> float:
        found = losses[part.name]
        return found[4].kl - found[8].kl

    prices = {part.name: price_bytes(part, shapes, target) for part in parts}
    raised = [part for part in parts if bits[part.name] == 4 and prices[part.name] > 0 and gain(part) > 0]
    for part in sorted(raised, key=lambda part: gain(part) / prices[part.name], reverse=True):
        if prices[part.name] <= left:
            bits[part.name] = 8
            left -= prices[part.name]
    return bits
