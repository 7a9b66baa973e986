"""Files of the rooms -> the README's tree on stdout, one line a file, from its docstring."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("bundle", "distill", "export", "runtime_bench", "optimum", "experiments", "benchmarks", "scripts")
OTHERS = {
    "distill/launch/*.yaml": "configurations for accelerate launch: 1, 8 and 2 x 8 GPUs, and two processes on a CPU",
    "recipes/": "settings as YAML: the paper's two stages, the demo's runs",
    "Makefile": "make demo, make test",
    "pyproject.toml": "packages, pins, extras, settings of the linters",
    ".ci/run": "what must pass before anything lands",
    "android_demo/": "what the Android app will stand on",
    "ios_demo/": "what the iOS app will stand on",
    "tests/": "mirror the packages; golden/ holds the vectors that pytest replays, and Kotlin and Swift will",
}
NAME_WIDTH = 26


def tree() -> str:
    """Rooms with their files, then everything else."""
    lines = []
    for room in ROOMS:
        folder = None
        for path in sorted((ROOT / room).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            if path.name == "__init__.py":
                continue
            if path.parent != folder:
                folder = path.parent
                lines.append(f"{folder.relative_to(ROOT).as_posix()}/")
            lines.append(f"  {path.name:<{NAME_WIDTH}}{first_line(path)}")
    return "\n".join(lines + [f"{name:<{NAME_WIDTH + 2}}{what}" for name, what in OTHERS.items()])


def first_line(path: Path) -> str:
    """What the file says it is for."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0].rstrip(".")


if __name__ == "__main__":
    sys.stdout.write(tree() + "\n")
