"""Name -> path of a committed configuration for accelerate launch; and what each of them is for, in a line."""

from __future__ import annotations

from pathlib import Path

from bundle.errors import UsageError

FOLDER = Path(__file__).parent


def launch_configs() -> dict[str, Path]:
    """Every committed configuration by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def launch_config(name: str) -> Path:
    """The file of one configuration.

    Raises:
        UsageError: there is none of that name.
    """
    found = launch_configs()
    if name not in found:
        raise UsageError(f"no launch configuration '{name}'; there are: {', '.join(found)}")
    return found[name]


def purpose(file: Path) -> str:
    """The first line of a configuration: what it is for."""
    return file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
