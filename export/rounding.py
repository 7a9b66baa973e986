"""MobileVlm -> the same model with the inputs of its linear layers rounded as integer or half-precision kernels do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bundle.tolerances import Activations
from distill.models.mobilevlm import MobileVlm


def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round each row of [.., K] to 255 levels between plus and minus its largest magnitude."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return torch.round(x / scale) * scale


def half_precision(x: torch.Tensor) -> torch.Tensor:
    """Round to float16."""
    return x.half().to(x.dtype)


ROUNDINGS: dict[Activations, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": int8_per_token,
    "float16": half_precision,
}


@contextmanager
def rounded_activations(vlm: MobileVlm, activations: Activations) -> Iterator[None]:
    """Round the inputs of every linear layer of ``vlm`` while the block runs."""
    if activations not in ROUNDINGS:
        yield
        return

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (ROUNDINGS[activations](inputs[0]), *inputs[1:])

    handles = [module.register_forward_pre_hook(hook) for module in vlm.modules() if isinstance(module, nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
