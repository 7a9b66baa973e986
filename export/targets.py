"""Target name -> the function that writes its graphs; each backend is imported only when its target is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from bundle.errors import UsageError, missing_extra
from bundle.manifest import Target

if TYPE_CHECKING:
    from export.contract import ExportedGraphs, ExportRequest

    Exporter = Callable[[ExportRequest], ExportedGraphs]


def _onnx() -> Exporter:
    from export.onnx.to_onnx import export_onnx

    return export_onnx


def _executorch() -> Exporter:
    from export.executorch.to_executorch import export_executorch

    return export_executorch


def _coreml() -> Exporter:
    from export.coreml.to_coreml import export_coreml

    return export_coreml


def _coreai() -> Exporter:
    from export.coreai.to_coreai import export_coreai

    return export_coreai


TARGETS: dict[Target, Callable[[], Exporter]] = {
    "executorch": _executorch,
    "coreml": _coreml,
    "onnx": _onnx,
    "coreai": _coreai,
}

# What a target's extra installs beside torch and transformers: writes its files and runs them.
PACKAGES: dict[Target, tuple[str, ...]] = {
    "executorch": ("executorch", "torchao"),
    "coreml": ("coremltools",),
    "onnx": ("onnx", "onnxruntime"),
    "coreai": ("coreai_torch",),
}


def known_target(name: str) -> Target:
    """Check a target's name.

    Raises:
        UsageError: unknown name; the message lists the known ones.
    """
    for target in TARGETS:
        if target == name:
            return target
    raise UsageError(f"--target '{name}' is unknown; allowed: {', '.join(TARGETS)}; run: alignkd-export --help")


def load_exporter(target: Target) -> Exporter:
    """Import a target's exporter.

    Raises:
        UsageError: a package of the target's extra is not installed.
    """
    for package in PACKAGES[target]:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, target)
    return TARGETS[target]()
