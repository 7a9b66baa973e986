"""Weights that the files hold -> the torch model that computes with them, each value within its rounding steps.

Each target has its own way back from its files: our packer's inverse over the ONNX data file, torchao's dequantize for
ExecuTorch, the decompressed constants of weight.bin for Core ML. What comes back is held against the checkpoint here by
one rule for all of them, which knows nothing of packing: how far rounding to nearest at the recipe's width can move a
value. A scale of the wrong block, a transposed or shifted matrix cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from bundle.errors import VerificationError
from bundle.manifest import Precision, Stage, Target
from distill.models.mobilevlm import MobileVlm
from export.recipe import Bits, Storage, storage_of

FLOAT16_STEP = 2.0**-10  # relative, twice the rounding error
SMALLEST_FLOAT16 = 2.0**-24
# Steps (largest magnitude of the group over the largest level) that rounding may move a value by. Symmetric codes end
# one level short on one side, and a scale that minimises the squared error clips the extremes: 1.5 steps were seen at
# 4 bits (onnx_weights.py), 0.53 at 8 (coremltools). A method that moves values further to make up for others' errors
# (GPTQ) needs a limit of its own.
STEP_LIMITS: dict[Bits, float] = {4: 2.0, 8: 1.5}
# What is left in float32 by the recipe but written as float16 by the target.
HALF_REST: frozenset[tuple[Target, Precision]] = frozenset(
    {("coreml", "int4"), ("coreml", "int8"), ("coreml", "fp16"), ("executorch", "fp16")}
)
# Targets that store a weight in other steps than the recipe: ExecuTorch's head goes with the decoder's linears.
OWN_STORAGE: dict[tuple[Target, Precision, str], Storage] = {("executorch", "int4", "lm_head.weight"): Storage(4, 32)}
STAGE_OF: tuple[tuple[str, Stage], ...] = (
    ("vision_tower.", "visual_tokens"),
    ("projector.", "visual_tokens"),
    ("language_model.embed_tokens.", "embeddings"),
    ("", "first_logits"),
)


def load_dequantized(
    vlm: MobileVlm, dequantized: Mapping[str, torch.Tensor], target: Target, precision: Precision
) -> None:
    """Put what the files hold into ``vlm``, weight by weight.

    Raises:
        VerificationError: a value is further from the checkpoint's than its rounding explains: it was packed wrongly.
    """
    parameters = vlm.state_dict()
    for name in dequantized:
        weight, original = dequantized[name], parameters[name]
        storage = target_storage(name, tuple(original.shape), target, precision)
        _check(name, weight, original, storage, target, precision)
        original.copy_(weight)


def target_storage(name: str, shape: tuple[int, ...], target: Target, precision: Precision) -> Storage:
    """The recipe's answer, the target's own exceptions, and float16 where the target writes the rest so."""
    storage = storage_of(name, shape, precision)
    own = OWN_STORAGE.get((target, precision, name))
    if own is not None and own.group_size is not None and shape[-1] % own.group_size == 0:
        return own
    return Storage(16, None) if storage.bits == 32 and (target, precision) in HALF_REST else storage


def rounded(weight: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Plain symmetric rounding to nearest: the reference that knows no target."""
    if storage.bits == 32:
        return weight
    if storage.bits == 16:
        return weight.half().to(weight.dtype)
    groups = _groups(weight, storage)
    steps = _steps(groups, storage.bits)
    levels = torch.round(groups / steps.clamp_min(torch.finfo(weight.dtype).tiny))
    return (levels * steps).reshape(weight.shape)


@contextmanager
def rounded_weights(vlm: MobileVlm, target: Target, precision: Precision) -> Iterator[None]:
    """Let every matrix of ``vlm`` compute with its ``rounded`` weights while the block runs, one layer at a time."""
    names: dict[nn.Module, str] = {
        module: f"{name}.weight" for name, module in vlm.named_modules() if isinstance(module, MATRICES)
    }
    kept: dict[nn.Module, torch.Tensor] = {}

    def swap(module: nn.Module, _inputs: object) -> None:
        weight = module.get_parameter("weight")
        storage = target_storage(names[module], tuple(weight.shape), target, precision)
        kept[module], weight.data = weight.data, rounded(weight.data, storage)

    def restore(module: nn.Module, _inputs: object, _output: object) -> None:
        module.get_parameter("weight").data = kept.pop(module)

    hooks = [module.register_forward_pre_hook(swap) for module in names]
    hooks += [module.register_forward_hook(restore) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


MATRICES = (nn.Linear, nn.Embedding, nn.Conv2d)


def _check(
    name: str, weight: torch.Tensor, original: torch.Tensor, storage: Storage, target: Target, precision: Precision
) -> None:
    if weight.shape != original.shape:
        raise _wrong(name, target, precision, f"has shape {list(weight.shape)}, not {list(original.shape)}")
    distance = _groups((weight - original).abs(), storage)  # [rows, groups, width]
    if storage.bits in STEP_LIMITS:
        allowed = STEP_LIMITS[storage.bits] * _steps(_groups(original, storage), storage.bits)
    else:
        allowed = _groups(original.abs(), storage) * FLOAT16_STEP + SMALLEST_FLOAT16
    beyond = ~(distance <= allowed)  # a value that is no number is beyond as well
    if not bool(beyond.any()):
        return
    row, group, _ = (int(at) for at in beyond.nonzero()[0])
    relative = float((weight - original).norm() / original.norm().clamp_min(torch.finfo(torch.float32).tiny))
    place = f"row {row}" if storage.group_size is None else f"row {row}, group {group} of {storage.group_size} values"
    raise _wrong(
        name,
        target,
        precision,
        f"is off by up to {float(distance[row, group].max()):.2e} in {place}, rounding explains "
        f"{float(allowed[row, group].max()):.2e} ({int(beyond.any(-1).sum())} groups so; {relative:.2e} as a whole)",
    )


def _wrong(name: str, target: Target, precision: Precision, what: str) -> VerificationError:
    stage = next(stage for prefix, stage in STAGE_OF if name.startswith(prefix))
    return VerificationError(
        f"stage '{stage}', kind quantization: the {target} files do not hold the checkpoint's weights at {precision}: "
        f"'{name}' {what}"
    )


def _groups(values: torch.Tensor, storage: Storage) -> torch.Tensor:
    """[rows, groups, width]; vectors are one row."""
    rows = values.reshape(values.shape[0], -1) if values.dim() > 1 else values.reshape(1, -1)
    return rows.reshape(rows.shape[0], -1, storage.group_size or rows.shape[1])


def _steps(groups: torch.Tensor, bits: Bits) -> torch.Tensor:
    """The step of each group [rows, groups, 1] when its largest magnitude takes the largest level."""
    return groups.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
