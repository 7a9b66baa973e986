"""Weight matrix -> 4-bit codes with the scales of torchao's HQQ, which looks at nothing but the weights."""

from __future__ import annotations

import torch

from bundle.errors import missing_extra
from export.weights.grid import HIGHEST, LOWEST, Coded, nearest, storable


def hqq(weight: torch.Tensor, group_size: int) -> Coded:
    """Half-quadratic quantization, scale only: torchao's search for the scale, then rounding to nearest.

    Args:
        weight: [N, K], K a multiple of ``group_size``.

    Raises:
        UsageError: torchao is not installed.
    """
    try:
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq
    except ModuleNotFoundError as error:
        raise missing_extra("torchao", "executorch") from error
    # torchao names it as its own, yet it is what its public configs run (IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY);
    # they quantize modules in place, of a large model one weight at a time is in memory here
    _, scales = _choose_qparams_and_quantize_scale_only_hqq(weight, [1, group_size], LOWEST, HIGHEST)
    return nearest(weight, storable(scales))
