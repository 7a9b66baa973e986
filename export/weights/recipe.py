"""Weight name and shape -> bits and group size: recipes as rules that all targets share; not how to pack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bundle.manifest import Precision

Bits = Literal[4, 8, 16, 32]


@dataclass(frozen=True)
class QuantRule:
    """How to store the weights whose state-dict name matches ``pattern`` as a whole.

    Attributes:
        group_size: values of a row that share a scale; None is one scale per output channel. Targets may store finer.
    """

    pattern: str
    bits: Bits
    group_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Rules of which the first that matches a weight's name decides.

    Attributes:
        precision: what the kernels compute in and the manifest says; single rules may store more or fewer bits.
    """

    name: str
    precision: Precision
    rules: tuple[QuantRule, ...]


@dataclass(frozen=True)
class Storage:
    """The rule's answer for one weight.

    Attributes:
        palette_rows: rows that share a table of 2**bits values, of which each weight stores a number; None: weights are
            multiples of a scale.
    """

    bits: Bits
    group_size: int | None
    palette_rows: int | None = None


DECODER_LINEARS = r"language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
EMBEDDING = r"language_model\.embed_tokens\.weight"
HEAD = r"lm_head\.weight"
VISION_LINEARS = (
    r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc[12])\.weight"
    r"|projector\.(linear_[12]|linears\.\d+)\.weight"
)
CONVOLUTIONS = r"vision_tower\.embeddings\.patch_embedding\.weight|projector\.position\.weight"
REST = QuantRule(r".*", 32)  # norms, biases, position and class embeddings: under 1 % of the bytes, and sensitive

# First match wins. Decoder linears are 90 % of the bytes and all of the decode bandwidth, so int4 goes there; the
# vision tower runs once per image and is compute bound, so 8 bits cost it no time and have a tenth of the error.
# Head and embedding, measured on two trained demo models (error of the first logits against float, then of 32 answer
# tokens): all int4 1.8e-2 to 4.5e-2, then 2.0e-2 to 1.0e-1; both int8 0.8e-2 to 3.5e-2, then 0.8e-2 to 5.1e-2. They are
# 10 % of a 1.7B model's weights, and only the head is read whole for each token.
INT4_RULES = (
    QuantRule(DECODER_LINEARS, 4, 32),
    QuantRule(HEAD, 8),
    QuantRule(EMBEDDING, 8),
    QuantRule(VISION_LINEARS, 8),
    REST,
)
# The four precisions and what else has a name.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int4", "int4", INT4_RULES),
        Recipe("int4-head4", "int4", (QuantRule(HEAD, 4, 32), *INT4_RULES)),  # reads the fewest bytes for each token
        # a scale for 128 values: faster and smaller, 20 % more error of the decoder's weights (docs/engines.md)
        Recipe("int4-g128", "int4", (QuantRule(DECODER_LINEARS, 4, 128), *INT4_RULES)),
        Recipe(
            "int8",
            "int8",
            (
                QuantRule(DECODER_LINEARS, 8),
                QuantRule(HEAD, 8),
                QuantRule(EMBEDDING, 8),
                QuantRule(VISION_LINEARS, 8),
                REST,
            ),
        ),
        Recipe(
            "fp16",
            "fp16",
            (
                QuantRule(DECODER_LINEARS, 16),
                QuantRule(HEAD, 16),
                QuantRule(EMBEDDING, 16),
                QuantRule(VISION_LINEARS, 16),
                QuantRule(CONVOLUTIONS, 16),
                REST,
            ),
        ),
        Recipe("fp32", "fp32", (REST,)),
    )
}


def storage_of(name: str, shape: tuple[int, ...], recipe: Recipe | Precision) -> Storage:
    """Look up one weight; a row that its group size does not divide falls back to 8 bits per channel.

    Args:
        recipe: or the precision whose own recipe is meant.
    """
    rule = rule_of(name, recipe)
    return Storage(8, None) if _falls_back(rule, shape) else Storage(rule.bits, rule.group_size)


def rule_of(name: str, recipe: Recipe | Precision) -> QuantRule:
    """The first rule that matches."""
    rules = recipe.rules if isinstance(recipe, Recipe) else RECIPES[recipe].rules
    return next(rule for rule in rules if re.fullmatch(rule.pattern, name))


def fallbacks(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe | Precision) -> list[str]:
    """The weights that get 8 bits per channel because their group size does not divide their width."""
    return [name for name, shape in shapes.items() if _falls_back(rule_of(name, recipe), shape)]


def _falls_back(rule: QuantRule, shape: tuple[int, ...]) -> bool:
    return rule.group_size is not None and shape[-1] % rule.group_size != 0
