"""YAML recipe -> the flags it stands for, checked against the settings; flags on the command line follow and win."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from bundle.errors import UsageError
from distill.settings.training import DistillConfig

FLAG = "--recipe"
COMMAND_LINE_ONLY = ("resume",)


def with_recipe(words: list[str]) -> list[str]:
    """Command-line words -> the same, the flags of every ``--recipe FILE`` in front, the option itself taken out.

    Raises:
        UsageError: a recipe is missing, no YAML, or has an unknown key or a value of the wrong type.
    """
    left, front = [], []
    at = 0
    while at < len(words):
        word = words[at]
        if word == FLAG or word.startswith(f"{FLAG}="):
            name = word.partition("=")[2] or (words[at + 1] if at + 1 < len(words) else "")
            at += 1 if "=" in word else 2
            if not name:
                raise UsageError(f"{FLAG} needs a YAML file, e.g. {FLAG} recipes/mobilevlm_v2_finetune.yaml")
            front += recipe_flags(Path(name))
        else:
            left.append(word)
            at += 1
    return front + left


def recipe_flags(file: Path) -> list[str]:
    """The flags that a recipe stands for."""
    if not file.is_file():
        raise UsageError(f"recipe {file} does not exist; give a YAML file of settings")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {file} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {file} holds {type(values).__name__}; give settings as 'name: value' lines")
    return _flags(DistillConfig, values, file, "")


def _flags(settings: type, values: Mapping[Any, Any], file: Path, prefix: str) -> list[str]:
    types = {name: kind for name, kind in get_type_hints(settings).items() if name not in COMMAND_LINE_ONLY}
    words = []
    for name, value in values.items():
        where = f"recipe {file}: {prefix}{name}"
        if name not in types:
            raise UsageError(f"{where} is no setting; allowed here: {', '.join(types)}")
        kind = types[name]
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise UsageError(f"{where} holds {value!r}; give its settings below it, indented")
            words += _flags(kind, value, file, f"{prefix}{name}.")  # type: ignore[arg-type]
            continue
        try:
            checked = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{where} is {value!r}: {error.errors()[0]['msg']}") from error
        words += _words(f"--{prefix}{name}".replace("_", "-"), checked)
    return words


def _words(flag: str, value: Any) -> list[str]:
    """One setting as words of the command line; None leaves the default."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]
