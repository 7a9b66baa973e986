"""Bundle of target coreml -> Runtime that evaluates its ML programs with numpy: any host, no Core ML, no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bundle.manifest import GraphName, Manifest
from bundle.runtimes.blas_threads import blas_threads
from bundle.runtimes.contract import Floats, Ids
from bundle.runtimes.coreml_inputs import causal_mask, gather_ids, next_position
from bundle.runtimes.mil_proto import coremltools_folder
from bundle.staging import inside

if TYPE_CHECKING:
    from bundle.runtimes.mil_program import Program, Rounding


# Below it the threads of a matrix product wait longer than they compute: 118 ms of CPU time with two threads on a busy
# host, 3 ms with one, for a tower of 96 pixels.
LARGE_HIDDEN_SIZE = 1024


def available() -> str | None:
    """None when this host can evaluate ML programs, else why not; imports neither package."""
    if coremltools_folder() is None:
        return "coremltools is not installed; run: pip install 'alignkd[coreml]'"
    if importlib.util.find_spec("scipy") is None:
        return "scipy is not installed; run: pip install 'alignkd[coreml]'"
    return None


def open_runtime(bundle: Path, manifest: Manifest, threads: int | None) -> CoreMlInterpreter:
    """Open the three packages; ``threads`` None takes one for a small model, and leaves it to numpy for a large one.

    Raises:
        UsageError: coremltools is missing, or a package is damaged or uses an unknown operation.
    """
    if threads is None and manifest.model.hidden_size < LARGE_HIDDEN_SIZE:
        threads = 1
    return CoreMlInterpreter(bundle, manifest, threads=threads)


class CoreMlInterpreter:
    """The Runtime of the ML program evaluator.

    Args:
        rounding: "float32" shows errors of the graph alone; "float16" rounds every result that the program declares
            float16, which estimates how far a phone drifts.
        threads: of numpy's matrix products; None leaves it to numpy.
    """

    covers = "CPU semantics; Neural Engine not covered"

    def __init__(
        self, bundle: Path, manifest: Manifest, rounding: Rounding = "float32", threads: int | None = None
    ) -> None:
        from bundle.runtimes.mil_program import Program  # scipy: not in the base install

        self.name = f"ML program evaluator (numpy {np.__version__}, {rounding})"
        self._shape = manifest.model
        self._threads = threads

        def program(name: GraphName) -> Program:
            return Program(inside(bundle, manifest.graphs[name].path, "graph path"), rounding)

        self._vision = program("vision_encoder")
        self._embedding = program("token_embedding")
        self._decoder = program("text_decoder")
        self._states = self._decoder.make_states()
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def encode_image(self, pixel_values: Floats) -> Floats:
        with blas_threads(self._threads):
            return self._vision({"pixel_values": pixel_values})["visual_tokens"]

    def embed(self, input_ids: Ids) -> Floats:
        return self._embedding({"input_ids": gather_ids(input_ids, self._shape)})["embeddings"]

    def decode(self, inputs_embeds: Floats) -> Floats:
        end = next_position(self._position, inputs_embeds, self._shape)
        mask = causal_mask(self._position, inputs_embeds.shape[1])
        with blas_threads(self._threads):
            out = self._decoder({"inputs_embeds": inputs_embeds, "causal_mask": mask}, self._states)
        self._position = end
        return out["logits"][0, 0]

    def reset(self, prefix_rows: int = 0) -> None:
        assert prefix_rows == 0  # these bundles have no prefix cache
        self._position = 0  # rows behind it are overwritten before they are read

    def close(self) -> None:
        del self._vision, self._embedding, self._decoder, self._states
