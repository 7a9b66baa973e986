"""A module and its row of the manifest -> an .aimodel on disk, the same bytes on every run."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import torch

from bundle.errors import VerificationError, missing_extra
from bundle.manifest import Graph, Tensor
from bundle.runtimes.coreai_asset import CUSTOM, ENTRY, METADATA_FILE, NAMES, open_asset
from bundle.staging import write_text_whole

CREATED = "creationDate"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the converter's progress and its warning of every torch build with a suffix ("+cpu") off the terminal."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def same_names() -> Iterator[None]:
    """Let the converter draw the names of its inner graphs from a seeded source, not from the system's."""
    modules: list[Any] = [import_module(f"coreai.authoring.{name}") for name in ("func", "graph_builder")]
    drawn = [module.choice for module in modules]
    try:
        for module in modules:
            module.choice = Random(0).choice
        yield
    finally:
        for module, choice in zip(modules, drawn, strict=True):
            module.choice = choice


def load_converter() -> Any:
    """coreai_torch, with the op that becomes a dequantization.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with quiet():
            import coreai_torch

            import_module("coreai_torch._compression.custom_layers")
    except ModuleNotFoundError as error:
        raise missing_extra("coreai-torch", "coreai") from error
    return coreai_torch


def convert(module: torch.nn.Module, example: tuple[torch.Tensor, ...], graph: Graph, asset: Path) -> None:
    """Convert ``module`` as traced on ``example`` and write ``asset``.

    Args:
        example: sizes of dynamic dimensions must differ from each other and from 1, or they are baked into the graph.

    Raises:
        UsageError: coreai-torch is not installed.
        VerificationError: the written program has other inputs, outputs or states than ``graph`` says.
    """
    coreai_torch = load_converter()
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(tensor.shape) if size is None}
        for tensor in graph.inputs
    )
    with quiet(), same_names(), torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic)
        program = program.run_decompositions(coreai_torch.get_decomp_table())
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        converter.add_exported_program(
            program,
            input_names=_names(graph.inputs),
            output_names=_names(graph.outputs),
            state_names=_names(graph.states),
            entrypoint_name=ENTRY,
        )
        del program
        converter.to_coreai().save_asset(asset)
    _check_signature(asset, graph)


def note_names(asset: Path, names: Mapping[int, str]) -> None:
    """Write the names of the constants into the asset's metadata, and drop the date, which differs between runs."""
    path = asset / METADATA_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop(CREATED, None)
    content[CUSTOM] = {NAMES: {str(place): name for place, name in sorted(names.items())}}
    write_text_whole(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _names(tensors: tuple[Tensor, ...]) -> list[str]:
    return [tensor.name for tensor in tensors]


def _check_signature(asset: Path, graph: Graph) -> None:
    summary = open_asset(asset).summary(include_statistics=False)
    for what, tensors, found in (
        ("inputs", graph.inputs, summary.function_inputs(ENTRY)),
        ("outputs", graph.outputs, summary.function_outputs(ENTRY)),
        ("states", graph.states, summary.function_states(ENTRY)),
    ):
        wanted = {tensor.name: _spelled(tensor) for tensor in tensors}
        if dict(found) != wanted:
            raise VerificationError(f"{asset.name}: {what}: {dict(found)}, expected {wanted}")


def _spelled(tensor: Tensor) -> str:
    """A tensor as the wheel's summary spells it: NDArray (Float16, 1 × ? × 128)."""
    sizes = " × ".join("?" if size is None else str(size) for size in tensor.shape)
    return f"NDArray ({tensor.dtype.capitalize()}, {sizes})"
