"""Weight names of a model -> the parts whose bits are chosen one by one: attention and MLP of a layer, head, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bundle.manifest import Stage, Target
from export.weights.recipe import EMBEDDING, HEAD, RECIPES, Bits, QuantRule, Recipe, storage_of

GROUP_SIZE = 32
# Names of matrices that a target's kernels, or our packers for them, take at 8 bits only.
EIGHT_BITS_ONLY: dict[Target, tuple[str, ...]] = {"executorch": (EMBEDDING,), "onnx": (), "coreml": (), "coreai": ()}
LAYER_PART = re.compile(r"language_model\.layers\.(\d+)\.(self_attn|mlp)\.")
TOWER_PART = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """Matrices that get the same bits.

    Attributes:
        pattern: of their names, as a recipe's rule has it.
        stage: where an error of theirs shows first.
        layer: of the decoder, from which on the states change; None: from the inputs on. The head's is their number.
    """

    name: str
    pattern: str
    stage: Stage
    layer: int | None
    weights: tuple[str, ...]


def parts_of(shapes: Mapping[str, tuple[int, ...]], tower_layers: int, decoder_layers: int) -> list[Part]:
    """All parts that the int8 recipe quantizes, tower first; layers that the projector never reads are left out."""
    found: dict[tuple[str, str, Stage, int | None], list[str]] = {}
    for name, shape in shapes.items():
        if storage_of(name, shape, "int8").bits == 8:
            tower = TOWER_PART.match(name)
            if tower is None or int(tower[1]) < tower_layers:
                found.setdefault(_place(name, decoder_layers), []).append(name)
    parts = [Part(*place, tuple(weights)) for place, weights in found.items()]
    return sorted(parts, key=lambda part: -1 if part.layer is None else part.layer)


def _place(name: str, decoder_layers: int) -> tuple[str, str, Stage, int | None]:
    if layer := LAYER_PART.match(name):
        number, kind = int(layer[1]), layer[2]
        what = "attention" if kind == "self_attn" else "mlp"
        pattern = rf"language_model\.layers\.{number}\.{kind}\.\w+_proj\.weight"
        return f"decoder layer {number} {what}", pattern, "first_logits", number
    if layer := TOWER_PART.match(name):
        pattern = rf"vision_tower\.encoder\.layers\.{layer[1]}\.(self_attn\.\w+_proj|mlp\.fc[12])\.weight"
        return f"vision layer {layer[1]}", pattern, "visual_tokens", None
    if re.fullmatch(HEAD, name):
        return "head", HEAD, "first_logits", decoder_layers
    if re.fullmatch(EMBEDDING, name):
        return "embedding", EMBEDDING, "embeddings", None
    return "projector", r"projector\.linear_[12]\.weight", "visual_tokens", None


def recipe_of(name: str, bits: Iterable[tuple[Part, Bits]]) -> Recipe:
    """A recipe with one rule for each part at 4 bits; everything else is as in the int8 recipe."""
    rules = [QuantRule(part.pattern, 4, GROUP_SIZE) for part, width in bits if width == 4]
    return Recipe(name, "int4", (*rules, *RECIPES["int8"].rules))
