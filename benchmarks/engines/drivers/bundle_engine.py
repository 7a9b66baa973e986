"""Driver of alignkd's own bundles, on the runtime that alignkd-bench and alignkd-verify open them with."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from protocol import Job, run_driver, timed_answer

from bundle.manifest import read_manifest
from bundle.runtimes.registry import open_runtime


class BundleEngine:
    """A bundle on its first runtime of this host, with the graphs that the part needs."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.model)
        manifest = read_manifest(folder)
        vision = job.part == "vision"
        graphs = {name: graph for name, graph in manifest.graphs.items() if (name == "vision_encoder") == vision}
        self._runtime = open_runtime(folder, manifest.model_copy(update={"graphs": graphs}), job.threads)
        self.name = self._runtime.name

    def encode(self, pixels: np.ndarray) -> float:
        start = time.perf_counter()
        self._runtime.encode_image(pixels)
        return time.perf_counter() - start

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        self._runtime.reset()
        return timed_answer(self._next, ids, new_tokens)

    def _next(self, ids: list[int]) -> int:
        return int(self._runtime.decode(self._runtime.embed(np.array([ids], np.int64))).argmax())


if __name__ == "__main__":
    run_driver(BundleEngine)
