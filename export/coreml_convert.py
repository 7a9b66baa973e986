"""A traced module -> a Core ML package on disk: conversion, weight quantization, and the same bytes on every run."""

from __future__ import annotations

import io
import json
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bundle.errors import missing_extra
from bundle.manifest import Graph, Precision, Tensor
from bundle.runtimes.mil_proto import DATA_FOLDER, MODEL_FILE, read_spec
from export.recipe import Storage

CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"
# merging equal constants would rename them, and names are how weights are read back
KEPT_APART = "common::const_deduplication"


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
) -> Any:
    """Trace ``module`` on ``example`` and convert it to an iOS 18 ML program; returns an MLModel.

    Args:
        example: sizes of dynamic dimensions must differ from each other and from 1, or they are baked into the graph.
        longest: upper bound of every dynamic dimension (None in a Tensor's shape).
    """
    ct = load_coremltools()
    pipeline = ct.PassPipeline()
    pipeline.remove_passes({KEPT_APART})
    ranges: dict[int, Any] = {}  # one object per size of the example: equal sizes stay equal in the program

    def shape(tensor: Tensor, sizes: Sequence[int]) -> tuple[Any, ...]:
        return tuple(
            ranges.setdefault(size, ct.RangeDim(1, longest, default=1)) if dimension is None else dimension
            for dimension, size in zip(tensor.shape, sizes, strict=True)
        )

    with quiet(), torch.no_grad():
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
        return ct.convert(
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
            skip_model_load=True,
        )


def quantize(model: Any, storage: Mapping[str, Storage]) -> Any:
    """Quantize the constants named in ``storage``, symmetrically, and no others.

    A config for all constants would take the RoPE tables too, which cost 15 times the error of int4 weights' own graph.
    """
    if not storage:
        return model
    optimize = load_coremltools().optimize.coreml
    configs = {
        name: optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype=f"int{rule.bits}",
            granularity="per_channel" if rule.group_size is None else "per_block",
            block_size=rule.group_size or 0,
            weight_threshold=0,
        )
        for name, rule in storage.items()
    }
    with quiet():
        return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(op_name_configs=configs))


def save_package(model: Any, package: Path) -> None:
    """Save, then drop what differs between runs: the conversion date, random item ids and the order of maps."""
    with quiet():
        model.save(str(package))
    spec = read_spec(package)
    spec.description.metadata.userDefined.pop(CONVERSION_DATE, None)
    (package / DATA_FOLDER / MODEL_FILE).write_bytes(spec.SerializeToString(deterministic=True))
    _name_items_by_path(package / "Manifest.json")


def _name_items_by_path(manifest: Path) -> None:
    content = json.loads(manifest.read_text(encoding="utf-8"))
    entries = content["itemInfoEntries"]
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper() for old, entry in entries.items()}
    content["itemInfoEntries"] = {names[old]: entries[old] for old in sorted(names, key=lambda old: names[old])}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")
