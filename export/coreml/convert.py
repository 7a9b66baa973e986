"""A module with placeholders -> an iOS 18 ML program, its small constants, and none of its matrices."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.errors import missing_extra
from bundle.manifest import Graph, Precision, Tensor
from bundle.runtimes.mil_graph import block_of
from bundle.runtimes.mil_proto import read_spec, weight_path
from bundle.runtimes.mil_weights import WeightFile, read_value

# Merging equal constants would rename them, and names are how weights are found again; the others compute weights of
# convolutions anew from what are placeholders here, or make operations (batch_norm) that nobody asked for.
LEFT_OUT = frozenset(
    {
        "common::const_deduplication",
        "common::fuse_conv_scale",
        "common::fuse_conv_bias",
        "common::fuse_conv_batchnorm",
        "common::fuse_elementwise_to_batchnorm",
    }
)


@dataclass(frozen=True)
class Converted:
    """One function of an ML program.

    Attributes:
        spec: the converter's Model message; its constants point into a file that is gone.
        constants: name -> value of every constant that lay in that file, but for the placeholders.
    """

    spec: Any
    constants: dict[str, NDArray[Any]]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' progress bars, version warnings and tracer warnings off stderr."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_coremltools() -> Any:
    """coremltools with its optimisers.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with quiet():
            import coremltools
            import coremltools.optimize.coreml
    except ModuleNotFoundError as error:
        raise missing_extra("coremltools", "coreml") from error
    return coremltools


def convert(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    graph: Graph,
    precision: Precision,
    longest: int,
    placeholders: frozenset[str],
    room: Path,
) -> Converted:
    """Trace ``module`` on ``example`` and convert it.

    Args:
        example: sizes of dynamic dimensions must differ from each other and from 1, or they are baked into the graph.
        longest: upper bound of every dynamic dimension (None in a Tensor's shape).
        placeholders: constants, by ``flat_name``, that are not read.
        room: a folder for the converter's file of all constants, placeholders included; it is removed again.
    """
    ct = load_coremltools()
    with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=room) as folder:
        package = Path(folder) / "converted.mlpackage"
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
        with _temporary_files_in(folder):
            _convert(ct, traced, example, graph, precision, longest, package)
        spec = read_spec(package)
        return Converted(spec, _constants(spec, package, placeholders))


def _convert(
    ct: Any,
    traced: Any,
    example: tuple[torch.Tensor, ...],
    graph: Graph,
    precision: Precision,
    longest: int,
    package: Path,
) -> None:
    pipeline = ct.PassPipeline()
    pipeline.remove_passes(LEFT_OUT)
    ranges: dict[int, Any] = {}  # one object per size of the example: equal sizes stay equal in the program

    def shape(tensor: Tensor, sizes: Sequence[int]) -> tuple[Any, ...]:
        return tuple(
            ranges.setdefault(size, ct.RangeDim(1, longest, default=1)) if dimension is None else dimension
            for dimension, size in zip(tensor.shape, sizes, strict=True)
        )

    ct.convert(
        traced,
        inputs=[
            ct.TensorType(tensor.name, shape(tensor, value.shape), dtype=np.dtype(tensor.dtype).type)
            for tensor, value in zip(graph.inputs, example, strict=True)
        ],
        outputs=[ct.TensorType(tensor.name, dtype=np.dtype(tensor.dtype).type) for tensor in graph.outputs],
        states=[
            ct.StateType(ct.TensorType(shape=tensor.shape, dtype=np.dtype(tensor.dtype).type), name=tensor.name)
            for tensor in graph.states
        ]
        or None,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32 if precision == "fp32" else ct.precision.FLOAT16,
        pass_pipeline=pipeline,
        package_dir=str(package),
        skip_model_load=True,
    )


@contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """coremltools writes its file of constants wherever temporary files go, which may be memory."""
    before = tempfile.tempdir
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def _constants(spec: Any, package: Path, placeholders: frozenset[str]) -> dict[str, NDArray[Any]]:
    weights = WeightFile(weight_path(package))
    found: dict[str, NDArray[Any]] = {}
    for operation in block_of(spec).operations:
        if operation.type != "const":
            continue
        name, value = operation.outputs[0].name, operation.attributes["val"]
        if value.WhichOneof("value") == "blobFileValue" and plain_name(name) not in placeholders:
            read = read_value(value, weights)
            assert isinstance(read, np.ndarray)
            found[name] = read.copy()
    return found


def flat_name(parameter: str) -> str:
    """The converter's spelling of a parameter's name."""
    return parameter.replace(".", "_")


def plain_name(constant: str) -> str:
    """A constant's name without what the converter hangs on it."""
    return constant.removesuffix("_to_fp16")
