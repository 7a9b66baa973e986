"""MobileVlm -> the same model with the inputs of its linear layers rounded as integer or half-precision kernels do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bundle.tolerances import Activations
from distill.models.mobilevlm import MobileVlm

Rounding = Callable[[torch.Tensor], torch.Tensor]
BLOCK = 32


def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round each row of [.., K] to 255 levels between plus and minus its largest magnitude."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return torch.round(x / scale) * scale


def int8_with_zero_point(x: torch.Tensor) -> torch.Tensor:
    """Round each row of [.., K] to 256 levels from its least to its largest value, one of which is 0 (XNNPACK)."""
    least, largest = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((largest - least) / 255).clamp_min(torch.finfo(x.dtype).tiny)
    zero = torch.round(-128 - least / scale)
    return ((torch.round(x / scale) + zero).clamp(-128, 127) - zero) * scale


def int8_per_block(x: torch.Tensor) -> torch.Tensor:
    """Round each 32 values of a row of [.., K] to 255 levels of their own (onnxruntime's MatMulNBits)."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    blocks = padded.reshape(*padded.shape[:-1], -1, BLOCK)
    return int8_per_token(blocks).reshape(padded.shape)[..., : x.shape[-1]]


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    """Kernels that compute in float32."""
    return x


def half_precision(x: torch.Tensor) -> torch.Tensor:
    """Round to float16."""
    return x.half().to(x.dtype)


# Where few logits decide, one rounding may hardly move them and the next one much: of three, the largest is taken.
ROUNDINGS: dict[Activations, tuple[Rounding, ...]] = {
    "float32": (as_it_is,),
    "float16": (half_precision,),
    "int8": (int8_per_token, int8_with_zero_point, int8_per_block),
}


@contextmanager
def rounded_activations(vlm: MobileVlm, rounding: Rounding) -> Iterator[None]:
    """Round the inputs of every linear layer of ``vlm`` while the block runs."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    handles = [module.register_forward_pre_hook(hook) for module in vlm.modules() if isinstance(module, nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
