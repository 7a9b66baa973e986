"""Driver of MNN's LLM runtime on what llmexport wrote; text only."""

from __future__ import annotations

from importlib.metadata import version

import MNN.llm
import numpy as np
from protocol import Job, run_driver


class MnnEngine:
    """A decoder on MNN's CPU backend."""

    def __init__(self, job: Job) -> None:
        self.name = f"MNN {version('MNN')}"
        self._model = MNN.llm.create(f"{job.model}/config.json")
        self._model.set_config({"thread_num": job.threads, "precision": "low", "memory": "low", "reuse_kv": False})
        self._model.load()

    def encode(self, pixels: np.ndarray) -> float:
        raise NotImplementedError("llmexport knows no vision encoder of this kind")

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """By the engine's own clock, which counts prefill and decode apart."""
        self._model.reset()
        self._model.set_config({"max_new_tokens": new_tokens + 1})
        self._model.generate(ids)
        context = self._model.context
        context.refresh()
        return context.prefill_us / 1e6, context.decode_us / 1e6


if __name__ == "__main__":
    run_driver(MnnEngine)
