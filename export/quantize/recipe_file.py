"""--recipe NAME or FILE -> Recipe; whatever a target could not store is refused in one line before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from bundle.errors import UsageError
from bundle.manifest import Frozen, Target
from export.quantize.parts import EIGHT_BITS_ONLY
from export.weights.recipe import RECIPES, QuantRule, Recipe, storage_of

QKV = re.compile(r"(language_model\.layers\.\d+\.self_attn\.)[qkv]_proj\.weight")


class FileRule(Frozen):
    """A rule as a recipe's file has it."""

    pattern: Annotated[str, Field(min_length=1)]
    bits: Literal[4, 8, 32]
    group_size: Literal[32, 64, 128] | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    def rule(self) -> QuantRule:
        """The rule that targets read; 4 bits without a size come in groups of 32."""
        size = self.group_size or 32 if self.bits == 4 else None
        return QuantRule(self.pattern, self.bits, size)


class RecipeFile(Frozen):
    """A recipe's file: its rules come before those of its precision."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    precision: Literal["int4", "int8"] = "int4"
    rules: Annotated[tuple[FileRule, ...], Field(min_length=1)]


def find_recipe(name: str) -> Recipe:
    """The built-in recipe of that name, or the one in the YAML or JSON file of that name.

    Raises:
        UsageError: neither, or a file that holds no recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"--recipe '{name}' is no file and no recipe of ours; give a YAML or JSON file, 'auto', or one of: "
            f"{', '.join(RECIPES)}"
        )
    try:
        found = RecipeFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe {path} is neither YAML nor JSON ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise UsageError(
            f"--recipe {path}: '{where}': {first['msg']} ({error.error_count()} problems); a recipe has name, "
            "precision and rules of pattern, bits and group_size"
        ) from error
    rules = tuple(rule.rule() for rule in found.rules)
    return Recipe(found.name, found.precision, (*rules, *RECIPES[found.precision].rules))


def check_recipe(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], target: Target) -> None:
    """Refuse a recipe that names nothing, or asks for what the target's kernels or our packers do not do.

    Raises:
        UsageError: the first rule or weight at fault.
    """
    for rule in recipe.rules[: len(recipe.rules) - len(RECIPES[recipe.precision].rules)]:
        if not any(re.fullmatch(rule.pattern, name) for name in shapes):
            raise UsageError(
                f"recipe '{recipe.name}': no weight of the model matches '{rule.pattern}' as a whole; names look like "
                f"{next(iter(shapes))}"
            )
    storages = {name: storage_of(name, shape, recipe) for name, shape in shapes.items()}
    for name, storage in storages.items():
        if storage.bits < 16 and storage_of(name, shapes[name], "int8").bits != 8:
            raise UsageError(f"recipe '{recipe.name}' puts '{name}' at {storage.bits} bits; only matrices can be")
        if storage.bits == 4 and any(re.fullmatch(pattern, name) for pattern in EIGHT_BITS_ONLY[target]):
            raise UsageError(
                f"recipe '{recipe.name}' puts '{name}' at 4 bits; --target {target} takes it at 8 bits only"
            )
        if match := QKV.match(name):
            query = storages[f"{match[1]}q_proj.weight"]
            if storage != query:
                raise UsageError(
                    f"recipe '{recipe.name}' stores '{name}' otherwise than q_proj; query, key and value are one "
                    f"matrix: give them one rule, e.g. {match[1]}[qkv]_proj.weight"
                )
