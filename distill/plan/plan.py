"""DistillConfig + a number of GPUs -> what a run would train, need and take, on the meta device: nothing is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bundle.tokenizer import Tokenizer, open_tokenizer
from distill.align_kd.module import AlignKD
from distill.align_kd.row_terms import PRODUCT_LOGITS
from distill.batches.encoding import encode_row, room_for_ids
from distill.data.conversation import Row
from distill.data.rows import IndexedRows, read_rows
from distill.models.checkpoint import open_checkpoint
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.plan.memory import Decoder, Engine, Memory, Sizes, memory_per_gpu
from distill.settings.recording import CacheStorage
from distill.settings.training import DistillConfig
from distill.teacher.open_teacher import DTYPES, chosen_processing
from distill.teacher.view import TeacherShape
from distill.teacher_cache.entries import entry_bytes
from distill.teacher_cache.identity import processing_identity
from distill.teacher_cache.parts import NEEDS, demands, stored_as
from distill.teacher_cache.question import asked_by, recorded_teacher
from distill.training.module import make_module
from distill.training.parameter_groups import group_of, learning_rates

SAMPLED_ROWS = 200  # rows whose length is looked at, evenly spread
BYTES_PER_WEIGHT = {None: None, "8": 1.0, "4": 0.5}  # of a quantized matrix, scales aside


@dataclass(frozen=True)
class Trained:
    """One trainable parameter."""

    name: str
    group: str
    learning_rate: float
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def pattern(self) -> str:
        """The name with its layer's number left open."""
        return re.sub(r"(?<=layers\.)\d+", "*", self.name)


@dataclass(frozen=True)
class Plan:
    """What a run comes to.

    Attributes:
        positions: per row, the mean and the longest of a sample, visual tokens included.
        cache_bytes: of a recording of the teacher in the default storage, by the same sample; None without one.
        features_bytes: of the tower features of all images; ``features_kept`` whether they stay in memory.
        hours: at the given time per step, or None.
    """

    trained: tuple[Trained, ...]
    student_parameters: int
    teacher_parameters: int
    engine: Engine
    gpus: int
    memory: Memory
    rows: int
    images: int
    positions: tuple[float, int]
    steps_per_epoch: int
    steps: int
    rows_per_step: int
    features_bytes: int
    features_kept: bool
    cache_bytes: int | None
    hours: float | None


def make_plan(config: DistillConfig, gpus: int, engine: Engine, step_time_s: float | None) -> Plan:
    """Read the checkpoints' sizes and the data, and work out the rest.

    Raises:
        UsageError: as the training itself would.
    """
    rows = read_rows(config.data, config.image_folder)
    processing = chosen_processing(read_processing(config.student), config)
    module = meta_module(config)
    student, teacher = module.student, module.teacher
    positions = _positions(rows, processing, open_tokenizer(processing.tokenizer, config.student), student)
    trained = tuple(
        Trained(name, group_of(name), learning_rates(config)[group_of(name)], tuple(parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    )
    sizes = _sizes(config, module, trained, positions[1])
    per_epoch, steps = planned_steps(config, len(rows), gpus)
    images = int(rows.with_image.sum())  # at most: rows may share one
    features = images * student.config.patch_grid**2 * student.config.vision_config.hidden_size * 4
    return Plan(
        trained=trained,
        student_parameters=_count(student),
        teacher_parameters=_count(teacher) if teacher is not None else 0,
        engine=engine,
        gpus=gpus,
        memory=memory_per_gpu(sizes, engine, gpus, config.bf16, config.gradient_checkpointing),
        rows=len(rows),
        images=images,
        positions=positions,
        steps_per_epoch=per_epoch,
        steps=steps,
        rows_per_step=config.batch_size * gpus * config.gradient_accumulation,
        features_bytes=features,
        features_kept=config.freeze_tower and features <= config.cache_mb << 20,
        cache_bytes=None if teacher is None else _cache_bytes(config, rows, processing, module),
        hours=None if step_time_s is None else steps * step_time_s / 3600,
    )


def meta_module(config: DistillConfig) -> AlignKD:
    """The module that would be trained, without its weights: files are mapped, and only their headers are read."""
    student = open_checkpoint(config.student)[0]
    teacher = None
    recorded = None
    if config.needs_teacher and config.cache is not None:
        facts = recorded_teacher(config, student.config.text_config.num_hidden_layers)
        recorded = TeacherShape(facts.heads, facts.width)
    elif config.needs_teacher and config.teacher is not None:
        teacher = open_checkpoint(config.teacher)[0]
        nn.Module.to(teacher, dtype=DTYPES[config.teacher_dtype])
    with torch.device("meta"):
        return make_module(config, student, teacher, recorded=recorded)


def planned_steps(config: DistillConfig, rows: int, gpus: int) -> tuple[int, int]:
    """Optimizer steps per epoch and in all, counted as transformers.Trainer counts them over ``LengthGroupedOrder``."""
    batches = math.ceil(rows / config.batch_size) if gpus == 1 else rows // (config.batch_size * gpus)
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation))
    return per_epoch, config.max_steps or math.ceil(config.epochs * per_epoch)


def _sample(rows: IndexedRows) -> Iterator[Row]:
    count = min(SAMPLED_ROWS, len(rows))
    return (rows[i * len(rows) // count] for i in range(count))


def _cache_bytes(config: DistillConfig, rows: IndexedRows, processing: Processing, module: AlignKD) -> int | None:
    """At most, because rows may share an image; None where a term needs a running teacher."""
    teacher, student, sizes = module.teacher, module.student, []
    if teacher is None or not set(config.term_weights) <= set(NEEDS):
        return None
    asked = asked_by(config, student.config.text_config.num_hidden_layers)
    parts = demands(asked, "", processing_identity(processing))
    stored = {part: stored_as(asked, CacheStorage(), demand) for part, demand in parts.items()}
    tokenizer, image_id = open_tokenizer(processing.tokenizer, config.student), processing.tokenizer.image_token_id
    context = student.config.text_config.max_position_embeddings
    for row in _sample(rows):
        room = room_for_ids(row, context, student.config.visual_tokens)
        ids, labels = (numbers[:room] for numbers in encode_row(row, processing, tokenizer))
        sizes += [entry_bytes(part, one, teacher.config, ids, labels, image_id) for part, one in stored.items()]
    return sum(sizes) * len(rows) // min(SAMPLED_ROWS, len(rows))


def _positions(
    rows: IndexedRows, processing: Processing, tokenizer: Tokenizer, student: MobileVlm
) -> tuple[float, int]:
    context = student.config.text_config.max_position_embeddings
    lengths = []
    for row in _sample(rows):
        length = len(encode_row(row, processing, tokenizer)[0])
        lengths.append(min(context, length + (student.config.visual_tokens - 1 if row.image else 0)))
    return sum(lengths) / len(lengths), max(lengths)


def _sizes(config: DistillConfig, module: AlignKD, trained: tuple[Trained, ...], longest: int) -> Sizes:
    student, teacher = module.student, module.teacher
    layers = student.language_model.layers
    inner = _count(student.vision_tower) + sum(_count(layer) for layer in layers[1:])
    return Sizes(
        student=_count(module),
        trained=sum(one.count for one in trained),
        trained_tensors=len(trained),
        borrowed=_count(module) - inner,
        layer=_count(layers[-1]),
        teacher_bytes=_teacher_bytes(teacher, config) if teacher is not None else 0,
        decoder=_decoder(student),
        teacher_decoder=_decoder(teacher) if teacher is not None else None,
        tokens=config.batch_size * longest,
        logit_values=min(PRODUCT_LOGITS, config.batch_size * longest * student.config.text_config.vocab_size),
    )


def _teacher_bytes(teacher: MobileVlm, config: DistillConfig) -> int:
    """On the device: all of it, its decoder's matrices in fewer bits, or the largest module that visits the device."""
    whole = DTYPES[config.teacher_dtype].itemsize
    if config.teacher_placement == "cpu":
        own = [sum(p.numel() for p in part.parameters(recurse=False)) for part in teacher.modules()]
        return whole * max(own)
    per_weight = BYTES_PER_WEIGHT[config.teacher_bits]
    if per_weight is None:
        return whole * _count(teacher)
    matrices = sum(part.weight.numel() for part in teacher.language_model.modules() if isinstance(part, nn.Linear))
    return whole * (_count(teacher) - matrices) + int(per_weight * matrices)


def _decoder(vlm: MobileVlm) -> Decoder:
    text = vlm.config.text_config
    return Decoder(text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_hidden_layers)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
