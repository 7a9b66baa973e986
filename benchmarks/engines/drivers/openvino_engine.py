"""Driver of OpenVINO: openvino-genai's LLMPipeline for text, a compiled model for pictures."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from protocol import Job, run_driver


class OpenVinoEngine:
    """A folder by optimum-intel, or an int8 vision encoder by NNCF."""

    def __init__(self, job: Job) -> None:
        self.name = f"openvino-genai {version('openvino-genai')}"
        properties = {"INFERENCE_NUM_THREADS": job.threads}
        if job.part == "vision":
            core = openvino.Core()
            self._vision = core.compile_model(Path(job.options["vision"]), "CPU", properties).create_infer_request()
        if job.part == "text":
            self._pipeline = openvino_genai.LLMPipeline(job.model, "CPU", **properties)

    def encode(self, pixels: np.ndarray) -> float:
        start = time.perf_counter()
        self._vision.infer([pixels])
        return time.perf_counter() - start

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """By the pipeline's own clock: time to the first token, and the durations between the tokens after it."""
        values = np.array([ids], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(values), openvino.Tensor(np.ones_like(values)))
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens + 1, do_sample=False, ignore_eos=True)
        metrics = self._pipeline.generate(inputs, config).perf_metrics
        assert metrics.get_num_generated_tokens() == new_tokens + 1, metrics.get_num_generated_tokens()
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 * new_tokens


if __name__ == "__main__":
    run_driver(OpenVinoEngine)
