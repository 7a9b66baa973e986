"""What the user asks of quantization: which recipe, which method, on which data, in which budget; checked together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bundle.errors import UsageError
from bundle.manifest import Precision
from export.quantize.calibration import CalibrationData
from export.quantize.methods import CALIBRATED, METHODS, Method
from export.quantize.recipe_file import find_recipe
from export.weights.recipe import RECIPES, Recipe

AUTO = "auto"


@dataclass(frozen=True)
class Quantizing:
    """How to store weights.

    Attributes:
        recipe: None: to be chosen for ``budget_mb``.
        method: of choosing 4-bit codes.
    """

    recipe: Recipe | None
    method: Method = "rtn"
    calibration: CalibrationData | None = None
    budget_mb: float | None = None

    @property
    def precision(self) -> Precision:
        """What the manifest says; a chosen recipe is a mix of 4 and 8 bits."""
        return "int4" if self.recipe is None else self.recipe.precision

    @property
    def bound(self) -> Recipe:
        """The recipe, or one that takes no less room than whichever will be chosen."""
        return self.recipe or RECIPES["int8"]

    def identity(self) -> dict[str, Any]:
        """What decides the stored weights, beside the checkpoint, as JSON."""
        rules = None if self.recipe is None else [[r.pattern, r.bits, r.group_size] for r in self.recipe.rules]
        data = None if self.calibration is None else [str(self.calibration.data), self.calibration.rows]
        return {"rules": rules, "method": self.method, "calibration": data, "budget_mb": self.budget_mb}


def quantizing(
    precision: Precision | None,
    recipe: str | None,
    method: str | None,
    calibration: CalibrationData | None,
    budget_mb: float | None,
) -> Quantizing:
    """Put the options together; None is an option that was not given.

    Raises:
        UsageError: an unknown recipe or method, or options that do not go together, with what would.
    """
    if method is not None and method not in METHODS:
        raise UsageError(f"--quant-method '{method}' is unknown; allowed: {', '.join(METHODS)}")
    if recipe is not None and precision is not None:
        raise UsageError(f"--recipe {recipe} says how many bits each weight gets; leave out --{precision}")
    if (recipe == AUTO) != (budget_mb is not None):
        raise UsageError("--recipe auto and --budget-mb N go together: the budget is what the recipe is chosen for")
    if budget_mb is not None and not budget_mb > 0:
        raise UsageError(f"--budget-mb {budget_mb:g} is not above 0")
    found = None if recipe == AUTO else find_recipe(recipe or precision or "int4")
    chosen: Method = next((known for known in METHODS if known == method), _default(found, calibration))
    fours = found is None or any(rule.bits == 4 for rule in found.rules)
    if method not in (None, "rtn") and not fours:
        assert found is not None
        raise UsageError(f"--quant-method {method} chooses 4-bit codes, of which {found.name} has none; leave it out")
    if calibration is None and (found is None or chosen in CALIBRATED):
        what = "--recipe auto" if found is None else f"--quant-method {chosen}"
        raise UsageError(f"{what} looks at what the model answers; give data by --calibration, e.g. train.json")
    if calibration is not None and found is not None and chosen not in CALIBRATED:
        raise UsageError(
            f"--calibration is for --recipe auto and --quant-method {', '.join(CALIBRATED)}, not for {chosen} of "
            f"{found.name}; leave it out"
        )
    return Quantizing(found, chosen, calibration, budget_mb)


def _default(recipe: Recipe | None, calibration: CalibrationData | None) -> Method:
    fours = recipe is None or any(rule.bits == 4 for rule in recipe.rules)
    return "gptq" if calibration is not None and fours else "rtn"
