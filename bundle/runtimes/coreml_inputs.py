"""Ids or rows to append -> the inputs of alignkd's three Core ML graphs, the same for macOS and for the interpreter."""

from __future__ import annotations

import numpy as np

from bundle.errors import UsageError
from bundle.manifest import ModelShape
from bundle.runtimes.contract import Floats, Ids

MASKED = -1e4  # float16 holds it, and its exponential is 0; minus infinity makes NaN where a row is all masked


def causal_mask(past: int, new: int) -> Floats:
    """Additive mask [1, 1, new, past + new]: row i sees the cache and the new rows up to itself."""
    return np.triu(np.full((new, past + new), MASKED, np.float32), past + 1)[None, None]


def next_position(past: int, inputs_embeds: Floats, shape: ModelShape) -> int:
    """Tokens in the cache after ``inputs_embeds`` [1, Q, D] was appended.

    Raises:
        UsageError: they do not fit the exported context.
    """
    end = past + inputs_embeds.shape[1]
    if end > shape.context_length:
        raise UsageError(
            f"{end} tokens do not fit the context of {shape.context_length}; ask for fewer new tokens, or run: "
            f"alignkd-export --context-length {end}"
        )
    return end


def gather_ids(input_ids: Ids, shape: ModelShape) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """input_ids [1, T] as the graph's int32.

    Raises:
        UsageError: an id outside the vocabulary; the graph would read another row for it.
    """
    outside = (input_ids < 0) | (input_ids >= shape.vocab_size)
    if outside.any():
        raise UsageError(
            f"token id {int(input_ids[outside][0])} is outside the vocabulary of {shape.vocab_size}; "
            "use the bundle's own tokenizer"
        )
    return input_ids.astype(np.int32)
