"""Bundle of target coreml -> Runtime on Apple's Core ML through coremltools' MLModel, on macOS 15 or later.

Not run on a Mac so far: its inputs, states and outputs are tested against a stand-in for MLModel only.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bundle.errors import missing_extra
from bundle.manifest import GraphName, Manifest
from bundle.runtimes.contract import Floats, Ids
from bundle.runtimes.coreml_inputs import Call, decoder_calls, embedding_calls, entry_points, next_position
from bundle.runtimes.mil_proto import coremltools_folder
from bundle.staging import inside

FIRST_MACOS = 15  # states of ML programs (iOS 18)
NUMPY_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int32": np.int32}


class Model(Protocol):
    """What is used of coremltools' MLModel."""

    def make_state(self) -> Any:
        """A zeroed KV cache."""

    def predict(self, data: Mapping[str, np.ndarray[Any, Any]], state: Any = None) -> Mapping[str, Any]:
        """Inputs by name -> outputs by name; ``state`` is changed in place."""


def available() -> str | None:
    """None when Core ML itself can run here, else why not."""
    if sys.platform != "darwin":
        return "needs macOS"
    version = platform.mac_ver()[0]
    if int(version.split(".")[0] or 0) < FIRST_MACOS:
        return f"needs macOS {FIRST_MACOS} or later, this is {version}"
    if coremltools_folder() is None:
        return "coremltools is not installed; run: pip install 'alignkd[coreml]'"
    return None


def open_runtime(bundle: Path, manifest: Manifest, threads: int | None) -> CoreMlRuntime:
    """Compile and load the three packages; Core ML decides the threads, whatever ``threads`` says.

    Raises:
        UsageError: coremltools is missing.
    """
    try:
        import coremltools
    except ModuleNotFoundError as error:
        raise missing_extra("coremltools", "coreml") from error

    def load(name: GraphName, unit: Any) -> dict[str | None, Model]:
        path = str(inside(bundle, manifest.graphs[name].path, "graph path"))
        return {
            function: coremltools.models.MLModel(path, compute_units=unit, function_name=function)
            for function in entry_points(name, manifest)
        }

    units = coremltools.ComputeUnit
    # flexible shapes with states run on the GPU; a vision encoder of gpu bundles is static and may use all there is
    ane = manifest.coreml is not None and manifest.coreml.engine == "ane"
    return CoreMlRuntime(
        manifest,
        {
            "vision_encoder": load("vision_encoder", units.CPU_AND_NE if ane else units.ALL),
            "token_embedding": load("token_embedding", units.CPU_ONLY),
            "text_decoder": load("text_decoder", units.CPU_AND_NE if ane else units.CPU_AND_GPU),
        },
    )


class CoreMlRuntime:
    """The Runtime of Core ML on this Mac.

    Args:
        models: of each graph, by entry point.
    """

    def __init__(self, manifest: Manifest, models: Mapping[GraphName, Mapping[str | None, Model]]) -> None:
        self.name = f"Core ML, coremltools {importlib.metadata.version('coremltools')}"
        ane = manifest.coreml is not None and manifest.coreml.engine == "ane"
        units = "CPU and Neural Engine" if ane else "vision: any unit, decoder: CPU and GPU"
        self.covers = f"Core ML on this Mac ({units})"
        self._manifest = manifest
        self._models = dict(models)
        self._position = 0
        self._state = self._new_state()

    @property
    def position(self) -> int:
        return self._position

    def encode_image(self, pixel_values: Floats) -> Floats:
        return self._predict("vision_encoder", Call(None, {"pixel_values": pixel_values}, 1))

    def embed(self, input_ids: Ids) -> Floats:
        calls = embedding_calls(input_ids, self._manifest)
        return np.concatenate([self._predict("token_embedding", call)[:, : call.rows] for call in calls], 1)

    def decode(self, inputs_embeds: Floats) -> Floats:
        end = next_position(self._position, inputs_embeds, self._manifest.model)
        for call in decoder_calls(self._position, inputs_embeds, self._manifest):
            logits = self._predict("text_decoder", call, self._state)
        self._position = end
        return logits[0, 0]

    def reset(self, prefix_rows: int = 0) -> None:
        assert prefix_rows == 0  # these bundles have no prefix cache
        self._position = 0
        self._state = self._new_state()

    def close(self) -> None:
        self._models.clear()
        self._state = None

    def _new_state(self) -> Any:
        """One cache for all functions of the decoder."""
        return next(iter(self._models["text_decoder"].values())).make_state()

    def _predict(self, name: GraphName, call: Call, state: Any = None) -> Floats:
        graph = self._manifest.graphs[name]
        inputs = {
            tensor.name: np.ascontiguousarray(call.inputs[tensor.name], NUMPY_DTYPES[tensor.dtype])
            for tensor in graph.inputs
        }
        model = self._models[name][call.function]
        outputs = model.predict(inputs) if state is None else model.predict(inputs, state)
        return np.asarray(outputs[graph.outputs[0].name], np.float32)
