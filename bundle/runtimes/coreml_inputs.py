"""Ids or rows to append -> calls of alignkd's Core ML graphs and their inputs, for macOS and for the interpreter.

Graphs for the GPU take any number of rows at once and a mask. Those for the Neural Engine have a function for many rows
and one for a single row, and are told where the rows stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError
from bundle.manifest import GraphName, Manifest, ModelShape
from bundle.runtimes.contract import Floats, Ids

MASKED = -1e4  # float16 holds it, and its exponential is 0; minus infinity makes NaN where a row is all masked


@dataclass(frozen=True)
class Call:
    """One call of a graph.

    Attributes:
        function: entry point; None where the package has one.
        rows: of its output those that were asked for; what follows is padding.
    """

    function: str | None
    inputs: dict[str, NDArray[Any]]
    rows: int


def entry_points(graph: GraphName, manifest: Manifest) -> tuple[str | None, ...]:
    """The functions of a graph's package; None is the only one's."""
    return (None,) if graph == "vision_encoder" else tuple(_functions(manifest)) or (None,)


def embedding_calls(input_ids: Ids, manifest: Manifest) -> Iterator[Call]:
    """Calls whose outputs, one behind the other, are the embeddings of ``input_ids`` [1, T].

    Raises:
        UsageError: an id outside the vocabulary; the graph would read another row for it.
    """
    ids = gather_ids(input_ids, manifest.model)
    functions = _functions(manifest)
    if not functions:
        yield Call(None, {"input_ids": ids}, ids.shape[1])
        return
    for function, size, start, end in _pieces(ids.shape[1], 0, ids.shape[1] + max(functions.values()), functions):
        yield Call(function, {"input_ids": _padded(ids[:, start:end], size)}, end - start)


def decoder_calls(position: int, inputs_embeds: Floats, manifest: Manifest) -> Iterator[Call]:
    """Calls that append ``inputs_embeds`` [1, Q, D] to a cache of ``position`` tokens; the last gives the logits."""
    functions, rows = _functions(manifest), inputs_embeds.shape[1]
    if not functions:
        yield Call(None, {"inputs_embeds": inputs_embeds, "causal_mask": causal_mask(position, rows)}, 1)
        return
    cache = manifest.graphs["text_decoder"].states[0].shape[2]
    assert cache is not None
    for function, size, start, end in _pieces(rows, position, cache, functions):
        inputs = {"inputs_embeds": _padded(inputs_embeds[:, start:end], size)}
        yield Call(function, inputs | static_inputs(position + start, end - start, size, cache, manifest), 1)


def static_inputs(at: int, count: int, size: int, cache: int, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """What a graph of static sizes is told of ``size`` rows that begin at place ``at``, the last ones being padding.

    Args:
        count: rows that are no padding; logits are asked for of the last of these.
        cache: rows of the cache.
    """
    assert manifest.coreml is not None and manifest.coreml.rope_theta is not None
    cos, sin = rope(at, size, manifest.model.head_dim, manifest.coreml.rope_theta)
    last_row = np.zeros((1, 1, 1, size), np.float32)
    last_row[..., count - 1] = 1
    return {
        "position": np.array([at], np.int32),
        "cos": cos,
        "sin": sin,
        "causal_mask": static_mask(at, size, cache),
        "last_row": last_row,
    }


def rope(start: int, rows: int, head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """cos and sin [1, 1, rows, head_dim] of the rotary embedding at ``start`` and the places behind it."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [d/2]
    angles = np.tile(np.outer(np.arange(start, start + rows), frequencies), 2)[None, None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def causal_mask(past: int, new: int) -> Floats:
    """Additive mask [1, 1, new, past + new]: row i sees the cache and the new rows up to itself."""
    return np.triu(np.full((new, past + new), MASKED, np.float32), past + 1)[None, None]


def static_mask(past: int, new: int, cache: int) -> Floats:
    """Additive mask [1, 1, new, cache], as ``causal_mask``; nothing sees what lies behind."""
    return np.triu(np.full((new, cache), MASKED, np.float32), past + 1)[None, None]


def _pieces(rows: int, position: int, cache: int, functions: dict[str, int]) -> Iterator[tuple[str, int, int, int]]:
    """Function, its size, first and last row of each call: the largest that is not padded much and fits the cache."""
    one, many = sorted(functions, key=lambda name: functions[name])
    start = 0
    while start < rows:
        size = functions[many]
        function = many if rows - start > 1 and position + start + size <= cache else one
        end = min(start + functions[function], rows)
        yield function, functions[function], start, end
        start = end


def _functions(manifest: Manifest) -> dict[str, int]:
    return {} if manifest.coreml is None else manifest.coreml.functions


def _padded(rows: NDArray[Any], size: int) -> NDArray[Any]:
    """[1, T, ...] with zeros behind it up to ``size``."""
    widths = [(0, 0), (0, size - rows.shape[1])] + [(0, 0)] * (rows.ndim - 2)
    return np.pad(rows, widths)


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


def gather_ids(input_ids: Ids, shape: ModelShape) -> NDArray[np.int32]:
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
