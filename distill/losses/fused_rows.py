"""Rows of hidden states, lm_head, terms of logits -> sums of the terms; their gradients are made in the forward pass.

Logits are made for as many rows as a matrix product needs to run at full speed, but terms a smaller chunk at a time:
they hold a dozen tensors of their logits' size. A chunk's logits give way to their gradient, and from those of all rows
two more products make the gradients into the hidden states and into lm_head's weight. So no logits are computed twice
in a training step, but the weights that the backward pass will bring have to be foretold. Where it brings others (one
term's own gradient, weights that changed), the rows are run again with those: slower, and as exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

FORETOLD = 1e-5  # relative; weights that differ by no more than float32 rounding are the foretold ones

# (logits [c, V], first row, one past the last) -> each term over these rows [K]
ChunkTerms = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class FusedRows:
    """What a chunk is computed with.

    Args:
        lm_head: see ``can_fuse``.
        terms: of a chunk's logits.
        chunk_rows: rows whose terms are computed together.
        product_rows: rows whose logits are alive together, a multiple of ``chunk_rows``.
    """

    lm_head: nn.Linear
    terms: ChunkTerms
    chunk_rows: int
    product_rows: int

    def __call__(self, hidden: torch.Tensor, foretold: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, D], the weight [K] that the backward pass will give each term -> sums over rows [K]."""
        if not torch.is_grad_enabled():
            return self.run(hidden, self.lm_head.weight, foretold, None, None)
        sums: torch.Tensor = _Fused.apply(self, hidden, self.lm_head.weight, foretold)
        return sums

    def run(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        term_weights: torch.Tensor,
        d_hidden: torch.Tensor | None,
        d_weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sums of the terms [K]; the gradients of their weighted sum are written into ``d_hidden`` and ``d_weight``.

        Called with gradients off.
        """
        sums: torch.Tensor | None = None
        differs = d_hidden is not None or d_weight is not None
        for begin in range(0, max(1, len(hidden)), self.product_rows):
            part = hidden[begin : begin + self.product_rows]  # [p, D]
            logits = self.lm_head(part)  # [p, V]
            for first in range(0, max(1, len(part)), self.chunk_rows):
                chunk = logits[first : first + self.chunk_rows]  # [c, V]
                values = self._chunk(chunk, begin + first, term_weights if differs else None)
                sums = values if sums is None else sums + values
            if d_hidden is not None:
                d_hidden[begin : begin + len(part)] = logits @ weight
            if d_weight is not None:
                _add_product(d_weight, logits.t(), part, begin == 0)
            del logits, chunk  # before the next rows'
        assert sums is not None
        return sums

    def _chunk(self, logits: torch.Tensor, first: int, term_weights: torch.Tensor | None) -> torch.Tensor:
        """Terms [K] of a chunk's logits [c, V]; with weights, the weighted sum's gradient is put in their place."""
        last = first + len(logits)
        if term_weights is None:
            return self.terms(logits, first, last).detach()
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(True)
            values = self.terms(leaf, first, last)
            (slope,) = torch.autograd.grad((values * term_weights).sum(), leaf)  # [c, V]
        logits.copy_(slope)
        return values.detach()


def can_fuse(lm_head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether lm_head's weight can be read and given a gradient directly.

    Not where it is wrapped (LoRA), quantized, or gathered only while the module runs (FSDP2, ZeRO-3).
    """
    return (
        type(lm_head) is nn.Linear
        and lm_head.bias is None
        and type(lm_head.weight) is nn.Parameter
        and lm_head.weight.numel() == lm_head.in_features * lm_head.out_features
    )


def sum_of_chunks(lm_head: nn.Module, terms: ChunkTerms, chunk_rows: int, hidden: torch.Tensor) -> torch.Tensor:
    """The same sums [K] for any lm_head: each chunk is run again in the backward pass, where there are several."""

    def run(part: torch.Tensor, first: int) -> torch.Tensor:
        return terms(lm_head(part), first, first + len(part))

    parts = hidden.split(chunk_rows)
    if len(parts) == 1:
        return run(hidden, 0)
    sums = [checkpoint(run, part, at * chunk_rows, use_reentrant=False) for at, part in enumerate(parts)]
    return torch.stack(sums).sum(0)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: FusedRows, hidden: torch.Tensor, weight: torch.Tensor, foretold: torch.Tensor
    ) -> torch.Tensor:
        _, need_hidden, need_weight, _ = ctx.needs_input_grad
        ctx.rows = rows
        ctx.device_type = hidden.device.type
        ctx.low = torch.get_autocast_dtype(ctx.device_type)
        ctx.autocast = torch.is_autocast_enabled(ctx.device_type)
        ctx.gradients = _buffers(hidden, weight, need_hidden, need_weight)
        ctx.save_for_backward(hidden, weight, foretold)
        return rows.run(hidden, weight, foretold, *ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, foretold = ctx.saved_tensors
        _, need_hidden, need_weight, _ = ctx.needs_input_grad
        factor = proportion(weights, foretold)
        if factor is not None and ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None  # given away: autograd may add others' to them in place
            if factor != 1:
                gradients = tuple(None if made is None else made.mul_(factor) for made in gradients)
        else:
            gradients = _buffers(hidden, weight, need_hidden, need_weight)
            with torch.autocast(ctx.device_type, dtype=ctx.low, enabled=ctx.autocast):
                ctx.rows.run(hidden, weight, weights, *gradients)
        return None, *gradients, None


def proportion(weights: torch.Tensor, foretold: torch.Tensor) -> float | None:
    """The factor by which ``weights`` [K] are the foretold ones, or None where they are others."""
    found, expected = weights.double().tolist(), foretold.double().tolist()
    largest = max(range(len(expected)), key=lambda term: abs(expected[term]))
    if expected[largest] == 0:
        return None
    factor: float = found[largest] / expected[largest]
    pairs = zip(found, expected, strict=True)
    same = all(abs(weight - factor * told) <= FORETOLD * abs(factor * told) for weight, told in pairs)
    if not same:
        return None
    return 1.0 if abs(factor - 1) <= FORETOLD else factor


def _buffers(
    hidden: torch.Tensor, weight: torch.Tensor, need_hidden: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (torch.empty_like(hidden) if need_hidden else None, torch.empty_like(weight) if need_weight else None)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, is_first: bool) -> None:
    """``total`` += left @ right; = where it is the first. Autocast makes the product in its own dtype."""
    if left.dtype == right.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)
        return
    product = left @ right.to(left.dtype)
    total.copy_(product) if is_first else total.add_(product)
