"""Driver of MNN's LLM runtime on what llmexport wrote; text only."""

from __future__ import annotations

from importlib.metadata import version

import MNN.llm
import numpy as np
from protocol import Job, run_driver

FIRST_WORD = 300  # ids before it are marks and single bytes, which are no text by themselves


class MnnEngine:
    """A decoder on MNN's CPU backend."""

    def __init__(self, job: Job) -> None:
        self.name = f"MNN {version('MNN')}"
        self._model = MNN.llm.create(f"{job.model}/config.json")
        settings = {"thread_num": job.threads, "precision": "low", "memory": "low", "sampler_type": "greedy"}
        self._model.set_config(settings | {"reuse_kv": False, "use_template": False})
        self._model.load()

    def encode(self, pixels: np.ndarray) -> float:
        raise NotImplementedError("llmexport knows no vision encoder of this kind")

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """By the engine's own clock. Its Python ``generate`` stops after the prefill, so the prompt goes in as text."""
        text = self._text(ids)
        self._model.reset()
        self._model.set_config({"max_new_tokens": new_tokens})
        self._model.response(text)
        context = self._model.context
        context.refresh()
        assert context.gen_seq_len == new_tokens, (context.gen_seq_len, new_tokens)
        return context.prefill_us / 1e6 * len(ids) / context.prompt_len, context.decode_us / 1e6

    def _text(self, ids: list[int]) -> str:
        """Text of about as many tokens: pieces that meet may join, so the time is scaled to the asked number."""
        words = [token if token >= FIRST_WORD else token + FIRST_WORD for token in ids]
        text = "".join(self._model.tokenizer_decode(token) for token in words)
        while len(self._model.tokenizer_encode(text)) > len(ids):
            text = text[:-1]
        return text


if __name__ == "__main__":
    run_driver(MnnEngine)
