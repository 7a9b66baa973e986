"""Bundle of target coreml -> Runtime that evaluates its ML programs with numpy: any host, no Core ML, no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bundle.manifest import GraphName, Manifest
from bundle.runtimes.blas_threads import blas_threads
from bundle.runtimes.contract import Floats, Ids
from bundle.runtimes.coreml_inputs import decoder_calls, embedding_calls, entry_points, next_position
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
        from bundle.runtimes.mil_program import open_programs  # scipy: not in the base install

        self.name = f"ML program evaluator (numpy {np.__version__}, {rounding})"
        self._manifest = manifest
        self._threads = threads

        def programs(name: GraphName) -> dict[str | None, Program]:
            package = inside(bundle, manifest.graphs[name].path, "graph path")
            return open_programs(package, entry_points(name, manifest), rounding)

        (self._vision,) = programs("vision_encoder").values()
        self._embedding = programs("token_embedding")
        self._decoder = programs("text_decoder")
        self._states = next(iter(self._decoder.values())).make_states()
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def encode_image(self, pixel_values: Floats) -> Floats:
        with blas_threads(self._threads):
            return self._vision({"pixel_values": pixel_values})["visual_tokens"]

    def embed(self, input_ids: Ids) -> Floats:
        calls = embedding_calls(input_ids, self._manifest)
        return np.concatenate(
            [self._embedding[call.function](call.inputs)["embeddings"][:, : call.rows] for call in calls], 1
        )

    def decode(self, inputs_embeds: Floats) -> Floats:
        end = next_position(self._position, inputs_embeds, self._manifest.model)
        with blas_threads(self._threads):
            for call in decoder_calls(self._position, inputs_embeds, self._manifest):
                out = self._decoder[call.function](call.inputs, self._states)
        self._position = end
        return out["logits"][0, 0]

    def reset(self, prefix_rows: int = 0) -> None:
        assert prefix_rows == 0  # these bundles have no prefix cache
        self._position = 0  # rows behind it are overwritten before they are read

    def close(self) -> None:
        del self._vision, self._embedding, self._decoder, self._states
