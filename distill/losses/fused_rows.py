"""Rows of hidden states, lm_head, terms of logits -> sums of the terms; their gradients are made in the forward pass.

No two chunks' logits are ever alive together, and none is computed twice in a training step: while a chunk's logits are
there, the gradients of the weighted sum of terms into the hidden states and into lm_head's weight are added up. The
weights that the backward pass will bring have to be foretold for that. Where it brings others (one term's own
gradient, weights that changed), the chunks are run again with those: slower, and as exact.
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
        chunk_rows: rows whose logits are alive together.
    """

    lm_head: nn.Linear
    terms: ChunkTerms
    chunk_rows: int

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
        for first in range(0, max(1, len(hidden)), self.chunk_rows):
            last = min(first + self.chunk_rows, len(hidden))
            part = hidden[first:last]  # [c, D]
            logits = self.lm_head(part)  # [c, V]
            if d_hidden is None and d_weight is None:
                values = self.terms(logits, first, last)
            else:
                with torch.enable_grad():
                    values = self.terms(logits.requires_grad_(True), first, last)
                    (slope,) = torch.autograd.grad((values * term_weights).sum(), logits)  # [c, V]
                if d_hidden is not None:
                    d_hidden[first:last] = slope @ weight
                if d_weight is not None:
                    _add_product(d_weight, slope.t(), part, first == 0)
                del slope
            sums = values.detach() if sums is None else sums + values.detach()
            del logits, values  # before the next chunk's
        assert sums is not None
        return sums


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
