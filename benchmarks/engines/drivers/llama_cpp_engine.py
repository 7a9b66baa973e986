"""Driver of llama.cpp through llama-cpp-python's C bindings: libllama for text, libmtmd for pictures."""

from __future__ import annotations

import ctypes
import time
from importlib.metadata import version

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from protocol import Job, run_driver, timed_answer

CONTEXT = 1024


class LlamaCppEngine:
    """A GGUF decoder, and beside it an mmproj file where pictures are asked for."""

    def __init__(self, job: Job) -> None:
        self.name = f"llama-cpp-python {version('llama-cpp-python')}"
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = job.part == "vision"
        self._model = llama_cpp.llama_model_load_from_file(job.model.encode(), parameters)
        assert self._model, job.model
        if job.part == "vision":
            self._open_vision(job)
        if job.part == "text":
            self._open_text(job)

    def _open_text(self, job: Job) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CONTEXT, 512, 512
        parameters.n_threads = parameters.n_threads_batch = job.threads
        parameters.flash_attn_type = int(job.options["flash_attention"])
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary = job.vocabulary

    def _open_vision(self, job: Job) -> None:
        mtmd_cpp.mtmd_log_set(self._silence, None)
        parameters = mtmd_cpp.mtmd_context_params_default()
        parameters.use_gpu, parameters.warmup, parameters.n_threads = False, False, job.threads
        self._vision = mtmd_cpp.mtmd_init_from_file(job.options["projector"].encode(), self._model, parameters)
        assert self._vision, job.options["projector"]

    def encode(self, pixels: np.ndarray) -> float:
        """Seconds of mtmd_encode_chunk: the picture is already cut and normalised."""
        size = pixels.shape[-1]
        rgb = np.clip(128 + 50 * pixels[0].transpose(1, 2, 0), 0, 255).astype(np.uint8).tobytes()  # [S, S, 3]
        buffer = (ctypes.c_uint8 * len(rgb)).from_buffer_copy(rgb)
        bitmap = mtmd_cpp.mtmd_bitmap_init(size, size, buffer)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        failed = mtmd_cpp.mtmd_tokenize(
            self._vision, chunks, ctypes.byref(text), (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap), 1
        )
        assert failed == 0, failed
        found = [mtmd_cpp.mtmd_input_chunks_get(chunks, at) for at in range(mtmd_cpp.mtmd_input_chunks_size(chunks))]
        chunk = next(c for c in found if mtmd_cpp.mtmd_input_chunk_get_type(c) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE)
        start = time.perf_counter()
        assert mtmd_cpp.mtmd_encode_chunk(self._vision, chunk) == 0
        seconds = time.perf_counter() - start
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        return seconds

    def answer(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return timed_answer(self._next, ids, new_tokens)

    def _next(self, ids: list[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        assert failed == 0, failed
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


if __name__ == "__main__":
    run_driver(LlamaCppEngine)
