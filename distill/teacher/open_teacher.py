"""Teacher checkpoint + settings -> the frozen teacher: checked against its student, its dtype, bits and place chosen.

The teacher is no part of the trained module, so no engine wraps or shards it: under DDP, FSDP2 and ZeRO alike every
process holds a whole copy, in float32, bfloat16, or with the decoder's matrices as 8 or 4 bit integers; or its weights
stay in host memory and visit the device layer by layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import cpu_offload
from rich.console import Console
from torch import nn

from bundle.errors import UsageError, missing_extra
from bundle.prompt import TEMPLATES
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.settings.recording import CacheConfig
from distill.settings.training import DistillConfig
from distill.teacher.pairing import Side, check_pair

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUP_SIZE = 32  # columns that share one scale at 4 bits


def chosen_processing(processing: Processing, config: DistillConfig | CacheConfig) -> Processing:
    """A checkpoint's processing with the template and image strategy that the settings name."""
    if config.template:  # instead of the checkpoint's own chat template, if it has one
        processing = replace(processing, prompt=TEMPLATES[config.template], turns=None)
    strategy = config.image_strategy or processing.image.strategy
    return replace(processing, image=processing.image.model_copy(update={"strategy": strategy}))


def open_teacher(
    config: DistillConfig, student: MobileVlm, processing: Processing, console: Console
) -> tuple[MobileVlm | None, Processing]:
    """The teacher on the CPU, or None when no term with a weight needs one, and its processing, or the student's.

    Raises:
        UsageError: a term compares what this pair does not share.
    """
    if not config.needs_teacher or config.teacher is None:
        if config.teacher is not None:
            console.print(
                f"teacher {config.teacher} is not opened: no loss term with a weight needs it", soft_wrap=True
            )
        return None, processing
    teacher = load_vlm(config.teacher, DTYPES[config.teacher_dtype])
    theirs = chosen_processing(read_processing(config.teacher), config)
    pair = Side.of(config.student, student, processing), Side.of(config.teacher, teacher, theirs)
    for note in check_pair(*pair, config.term_weights, config.mask):
        console.print(note, soft_wrap=True)
    console.print(
        f"teacher {config.teacher}: {sum(p.numel() for p in teacher.parameters()):,} parameters, frozen", soft_wrap=True
    )
    return teacher, theirs


def place_teacher(teacher: MobileVlm, config: DistillConfig, device: torch.device) -> None:
    """Put the teacher where and as the settings say, in place."""
    if config.teacher_placement == "cpu":
        cpu_offload(teacher, execution_device=device)
        return
    nn.Module.to(teacher, device)
    if config.teacher_bits is not None:
        quantize_decoder(teacher, config.teacher_bits)


def quantize_decoder(teacher: MobileVlm, bits: str) -> None:
    """Hold the matrices of the decoder's layers as integers, in place; arithmetic stays in the teacher's dtype.

    8 bits: one scale per row. 4 bits: a scale per 32 columns; packed two to a byte on CUDA, where torchao's kernel
    wants bfloat16, and one to a byte elsewhere, to rehearse the error without a GPU.

    Raises:
        UsageError: torchao is missing, or 4 bits on CUDA with a float32 teacher.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError as error:
        raise missing_extra("torchao", "executorch") from error
    weight = teacher.lm_head.weight  # not quantized; placed and typed as the decoder is
    if bits == "8":
        quantize_(teacher.language_model, Int8WeightOnlyConfig())
    elif weight.device.type == "cuda":
        if weight.dtype != torch.bfloat16:
            raise UsageError("--teacher-bits 4 computes in bfloat16 on CUDA; add --teacher-dtype bfloat16")
        quantize_(
            teacher.language_model,
            Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d"),
        )
    else:
        four = torch.int4  # type: ignore[attr-defined]  # torch 2.13 has it, its stubs do not
        quantize_(teacher.language_model, IntxWeightOnlyConfig(four, PerGroup(GROUP_SIZE)))
