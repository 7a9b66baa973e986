"""Weight name and shape -> how one target stores it at one export: the recipe, what overrides it, chosen codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bundle.manifest import Precision, Target
from export.weights.chosen import ChosenWeights
from export.weights.recipe import RECIPES, Recipe, Storage, storage_of

# What is left in float32 by the recipe but written as float16 by the target.
HALF_REST: frozenset[tuple[Target, Precision]] = frozenset(
    {
        ("coreml", "int4"),
        ("coreml", "int8"),
        ("coreml", "fp16"),
        ("executorch", "fp16"),
        ("coreai", "int4"),
        ("coreai", "int8"),
        ("coreai", "fp16"),
    }
)


@dataclass(frozen=True)
class StoragePlan:
    """How one export stores weights.

    Attributes:
        overrides: single weights, before the recipe.
        recipe: None: the precision's own.
        chosen: weights whose codes were chosen, None: all are rounded to nearest.
    """

    target: Target
    precision: Precision
    overrides: Mapping[str, Storage] = field(default_factory=dict)
    recipe: Recipe | None = None
    chosen: ChosenWeights | None = None

    def storage(self, name: str, shape: tuple[int, ...]) -> Storage:
        """The recipe's answer, or the override, and float16 where the target writes the rest so."""
        if name in self.overrides:
            return self.overrides[name]
        storage = storage_of(name, shape, self.recipe or RECIPES[self.precision])
        half = storage.bits == 32 and (self.target, self.precision) in HALF_REST
        return Storage(16, None) if half else storage
