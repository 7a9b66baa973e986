"""Driver of onnxruntime-genai on the folder that its own model builder wrote; text only."""

from __future__ import annotations

import json
import time
from importlib.metadata import version

import numpy as np
import onnxruntime_genai
from protocol import Job, run_driver

CONTEXT = 1024


class GenaiEngine:
    """A decoder on the CPU provider."""

    def __init__(self, job: Job) -> None:
        self.name = f"onnxruntime-genai {version('onnxruntime-genai')}"
        config = onnxruntime_genai.Config(job.model)
        options = {"intra_op_num_threads": job.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._parameters = onnxruntime_genai.GeneratorParams(self._model)
        self._parameters.set_search_options(max_length=CONTEXT, do_sample=False, min_length=CONTEXT)

    def encode(self, pixels: np.ndarray) -> float:
        raise NotImplementedError("the builder knows no vision encoder of this kind")

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        generator = onnxruntime_genai.Generator(self._model, self._parameters)
        start = time.perf_counter()
        generator.append_tokens(np.array([ids], np.int32))
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return prefilled - start, time.perf_counter() - prefilled


if __name__ == "__main__":
    run_driver(GenaiEngine)
