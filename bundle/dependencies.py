"""The packages that alignkd builds on: what pyproject.toml asks for, what was tested, what is installed here.

A literal copy, because an installed package cannot read pyproject.toml; a test keeps the two the same.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Literal

EXTRAS = ("distill", "data", "onnx", "executorch", "coreml", "coreai", "bench")
State = Literal["ok", "untested", "missing"]


@dataclass(frozen=True)
class Dependency:
    """One package.

    Attributes:
        requirement: as in pyproject.toml.
        tested: the version that the tests of this release ran with.
        extras: which extras ask for it; none means that alignkd itself does.
    """

    package: str
    requirement: str
    tested: str
    extras: tuple[str, ...]


DEPENDENCIES: tuple[Dependency, ...] = (
    Dependency("numpy", ">=2.0,<2.4", "2.3.5", ()),
    Dependency("pillow", ">=13,<14", "13.0.0", ()),
    Dependency("pydantic", ">=2.12,<3", "2.14.3", ()),
    Dependency("rich", ">=15,<16", "15.0.0", ()),
    Dependency("safetensors", ">=0.6", "0.8.0", ()),
    Dependency("sentencepiece", ">=0.2", "0.2.3", ()),
    Dependency("tokenizers", ">=0.22", "0.23.3", ()),
    Dependency("tyro", "==1.0.17", "1.0.17", ()),
    Dependency("pyyaml", ">=6", "6.0.3", ()),
    Dependency("psutil", ">=7", "7.2.2", ()),
    Dependency("torch", "==2.13.0", "2.13.0", ("distill", "onnx", "executorch", "coreml", "coreai")),
    Dependency("transformers", "==5.23.0", "5.23.0", ("distill", "onnx", "executorch", "coreml", "coreai")),
    Dependency("accelerate", "==1.15.0", "1.15.0", ("distill",)),
    Dependency("peft", "==0.21.2", "0.21.2", ("distill",)),
    Dependency("tensorboard", ">=2.20", "2.21.0", ("distill",)),
    Dependency("protobuf", ">=6", "7.36.2", ("distill",)),
    Dependency("scikit-image", ">=0.26,<0.27", "0.26.0", ("data",)),
    Dependency("pyarrow", ">=25", "26.0.1", ("data",)),
    Dependency("onnx", "==1.23.2", "1.23.2", ("onnx",)),
    Dependency("onnxruntime", "==1.32.0", "1.32.0", ("onnx", "bench")),
    Dependency("optimum", "==2.3.0", "2.3.0", ("onnx",)),
    Dependency("executorch", "==1.4.1", "1.4.1", ("executorch",)),
    Dependency("torchao", "==0.18.0", "0.18.0", ("executorch",)),
    Dependency("coremltools", "==9.0", "9.0", ("coreml",)),
    Dependency("scipy", ">=1.17,<1.18", "1.17.1", ("coreml", "bench")),
    Dependency("coreai-torch", "==0.4.3", "0.4.3", ("coreai",)),
    Dependency("coreai-core", "==1.0.0b3", "1.0.0b3", ("coreai",)),
    Dependency("plotly", ">=6,<8", "7.1.0", ("bench",)),
    Dependency("jinja2", ">=3.1", "3.1.6", ("distill", "bench")),
)


@dataclass(frozen=True)
class Found:
    """A dependency beside the version of this environment, None if it is not installed."""

    dependency: Dependency
    version: str | None

    @property
    def state(self) -> State:
        """ok: within the requirement; untested: outside it."""
        if self.version is None:
            return "missing"
        return "ok" if satisfies(self.version, self.dependency.requirement) else "untested"

    @property
    def pin(self) -> str:
        """The argument of pip install that brings it into the requirement."""
        return f"'{self.dependency.package}{self.dependency.requirement}'"


def look_up() -> tuple[Found, ...]:
    """Every dependency with its installed version; nothing is imported."""
    return tuple(Found(dependency, installed_version(dependency.package)) for dependency in DEPENDENCIES)


def installed_version(package: str) -> str | None:
    """The version pip knows of, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def of_extra(found: tuple[Found, ...], extra: str | None) -> tuple[Found, ...]:
    """The packages that an extra asks for; None for those of alignkd itself."""
    if extra is None:
        return tuple(one for one in found if not one.dependency.extras)
    return tuple(one for one in found if extra in one.dependency.extras)


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version meets clauses such as ">=2.0,<2.4" or "==2.13.0"; "+cpu" and the like do not count."""
    have = _numbers(version)
    clauses = re.findall(r"(==|>=|<)([^,]+)", requirement)
    return all(_holds(have, operator, _numbers(wanted)) for operator, wanted in clauses)


def _holds(have: tuple[int, ...], operator: str, wanted: tuple[int, ...]) -> bool:
    length = max(len(have), len(wanted))
    left, right = (numbers + (0,) * (length - len(numbers)) for numbers in (have, wanted))
    return {"==": left == right, ">=": left >= right, "<": left < right}[operator]


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers alone: "2.13.0+cpu" -> (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()
