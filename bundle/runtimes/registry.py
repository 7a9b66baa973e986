"""Target -> the runtimes that can execute it, and the first of them that this host has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bundle.errors import BackendMissingError, UsageError
from bundle.manifest import Backend, Family, Manifest, Target
from bundle.processor import host_family
from bundle.runtimes.contract import Runtime


class RuntimeModule(Protocol):
    """What every file in bundle/runtimes offers."""

    def available(self) -> str | None:
        """None when it can run here, else the reason in one line."""

    def open_runtime(self, bundle: Path, manifest: Manifest, threads: int | None) -> Runtime:
        """Load the graphs of an opened bundle."""


@dataclass(frozen=True)
class RuntimeEntry:
    """A runtime by the name that --runtime takes.

    Attributes:
        load: imports its file.
        family: what its arithmetic is judged as (bundle/tolerances.py).
    """

    name: str
    load: Callable[[], RuntimeModule]
    family: Callable[[], Family] = host_family


def _onnx() -> RuntimeModule:
    from bundle.runtimes import onnx

    return onnx


def _executorch() -> RuntimeModule:
    from bundle.runtimes import executorch

    return executorch


def _coreml() -> RuntimeModule:
    from bundle.runtimes import coreml

    return coreml


def _coreml_interpreter() -> RuntimeModule:
    from bundle.runtimes import coreml_interpreter

    return coreml_interpreter


def _coreai() -> RuntimeModule:
    from bundle.runtimes import coreai

    return coreai


def _coreai_interpreter() -> RuntimeModule:
    from bundle.runtimes import coreai_interpreter

    return coreai_interpreter


def _apple() -> Family:
    return "apple"


def _evaluator() -> Family:
    return "evaluator"


RUNTIMES: dict[Target, tuple[RuntimeEntry, ...]] = {
    "onnx": (RuntimeEntry("onnx", _onnx),),
    "executorch": (RuntimeEntry("executorch", _executorch),),
    # Apple's own runtime first; the interpreters walk the program on any host
    "coreml": (
        RuntimeEntry("coreml", _coreml, _apple),
        RuntimeEntry("coreml_interpreter", _coreml_interpreter, _evaluator),
    ),
    "coreai": (
        RuntimeEntry("coreai", _coreai, _apple),
        RuntimeEntry("coreai_interpreter", _coreai_interpreter, _evaluator),
    ),
}


def runtime_entries(target: Target, name: str | None = None) -> tuple[RuntimeEntry, ...]:
    """All runtimes of ``target``, or the one called ``name``.

    Raises:
        UsageError: the target has no runtime of that name.
    """
    entries = RUNTIMES[target]
    if name is None:
        return entries
    chosen = tuple(entry for entry in entries if entry.name == name)
    if not chosen:
        known = ", ".join(entry.name for entry in entries)
        raise UsageError(f"runtime '{name}' does not run bundles for '{target}'; allowed: {known}")
    return chosen


def no_runtime(target: Target, reasons: dict[str, str]) -> BackendMissingError:
    """The one line for a target that nothing on this host can run."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return BackendMissingError(
        f"no runtime on this host for target '{target}' ({listed}); alignkd-doctor tells what to install"
    )


# What a graph was lowered to that no runtime of ours has on any host, and where it runs.
DEVICE_BACKENDS: dict[Backend, str] = {
    "coreml": "Core ML, which iOS and macOS have",
    "vulkan": "Vulkan, which Android has",
}


def runs_elsewhere(manifest: Manifest) -> str | None:
    """Which graph no runtime of ours can run, and where it runs; None when all can be."""
    for name, graph in manifest.graphs.items():
        if graph.backend in DEVICE_BACKENDS:
            return (
                f"'{name}' is lowered to {DEVICE_BACKENDS[graph.backend]}, and no runtime on this host; replay the "
                "golden vectors with the app on a device, or export with --backend xnnpack"
            )
    return None


def first_entry(target: Target, name: str | None = None) -> RuntimeEntry:
    """The first runtime of ``target`` that can run here, or the one called ``name``.

    Raises:
        UsageError: unknown runtime name.
        BackendMissingError: none of them can run on this host.
    """
    reasons: dict[str, str] = {}
    for entry in runtime_entries(target, name):
        reason = entry.load().available()
        if reason is None:
            return entry
        reasons[entry.name] = reason
    raise no_runtime(target, reasons)


def open_runtime(bundle: Path, manifest: Manifest, threads: int | None = None, name: str | None = None) -> Runtime:
    """Open ``bundle`` on the first runtime that can run here, or on the one called ``name``.

    Raises:
        UsageError: unknown runtime name.
        BackendMissingError: none of them can run on this host.
    """
    elsewhere = runs_elsewhere(manifest)
    if elsewhere is not None:
        raise BackendMissingError(f"{bundle} cannot be run here: {elsewhere}")
    return first_entry(manifest.target, name).load().open_runtime(bundle, manifest, threads)
