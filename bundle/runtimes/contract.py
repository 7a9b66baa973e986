"""What every runtime offers: three graphs and a KV cache, numpy in and numpy out."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
CacheRows = NDArray[Any]  # [1, kv_heads, rows, head_dim], float32 or float16


class Runtime(Protocol):
    """One opened bundle on one engine. Not thread-safe; one sequence at a time."""

    name: str  # engine and version, e.g. "onnxruntime 1.32.0"
    covers: str  # what a verdict from it covers, e.g. "CPU" or "CPU semantics; Neural Engine not covered"

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""

    def encode_image(self, pixel_values: Floats) -> Floats:
        """pixel_values [1, 3, S, S] -> visual tokens [1, N, D]."""

    def embed(self, input_ids: Ids) -> Floats:
        """input_ids [1, T] (text ids only) -> embeddings [1, T, D]."""

    def decode(self, inputs_embeds: Floats) -> Floats:
        """Append inputs_embeds [1, T, D] to the KV cache -> logits of the last row [V]."""

    def reset(self, prefix_rows: int = 0) -> None:
        """Empty the KV cache, down to so many rows of the bundle's prefix cache; no bundle without one asks for any."""

    def close(self) -> None:
        """Release the engine's memory."""
