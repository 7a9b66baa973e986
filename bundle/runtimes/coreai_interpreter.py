"""Bundle of target coreai -> Runtime on the CPU runtime of Apple's Linux wheel: right answers, meaningless speed."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from pathlib import Path
from typing import Literal

from bundle.manifest import Manifest
from bundle.runtimes.coreai import CoreAiRuntime
from bundle.runtimes.coreai_asset import installed, open_asset
from bundle.runtimes.coreai_float32 import widened
from bundle.staging import inside

Rounding = Literal["float32", "float16"]
COVERS = "Apple's CPU runtime in float32; GPU and Neural Engine not covered"


def available() -> str | None:
    """None when the wheel's own runtime can run here, else why not; imports nothing."""
    if sys.platform == "darwin":
        return "is for Linux; on a Mac Core AI itself runs"
    return installed()


def open_runtime(
    bundle: Path, manifest: Manifest, threads: int | None, rounding: Rounding = "float32"
) -> CoreAiRuntime:
    """Compile the three assets; the wheel's runtime decides the threads, whatever ``threads`` says.

    Args:
        rounding: "float32" widens float16 first and shows errors of the graph alone; "float16" runs the program as it
            is, hundred times slower, with sums in float16 that no phone makes.

    Raises:
        UsageError: coreai-core is missing.
        VerificationError: an asset was changed.
    """
    with tempfile.TemporaryDirectory(prefix="alignkd-coreai-") as folder:  # compiled into a folder of its own at once
        assets = {}
        for name, graph in manifest.graphs.items():
            path = inside(bundle, graph.path, "graph path")
            wide = rounding == "float32" and manifest.precision != "fp32"
            assets[name] = widened(path, Path(folder) / f"{name}.aimodel") if wide else open_asset(path)
        version = importlib.metadata.version("coreai-core")
        return CoreAiRuntime(manifest, assets, f"Core AI's CPU runtime (coreai-core {version}, {rounding})", COVERS)
