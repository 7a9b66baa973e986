"""Weights, precision and context -> bytes of disk and memory that an export takes; does this machine have them?"""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from bundle.errors import UsageError
from bundle.golden import GREEDY_TOKENS
from bundle.manifest import ModelShape, Precision, Target
from export.weights.recipe import Recipe, storage_of

GIB = 1 << 30
FLOAT_BYTES, SCALE_BYTES = 4, 4
CHANNEL_BLOCK = 128
SPARE_DISK_BYTES = 64 << 20  # tokenizer, JSON, pictures, padding to pages
# Measured on ONNX exports: Python with torch, transformers and onnxruntime; then the session on the written files,
# which packs matrices anew for its kernels.
PROCESS_BYTES = 800 << 20
SESSION_PER_FILE_BYTE = 1.9
# Measured on Core ML exports: the converter holds placeholders as float16 and makes ten float32 copies of one; the
# evaluator holds all weights as float32 beside the packages (1.7B at int4: 12.28 GB at the peak of the whole export).
CONVERTED_BYTES, COPIES_BYTES, EVALUATED_BYTES = 2, 42, 6.7
ACTIVATION_BYTES = 1 << 30  # of three pictures in the tower and four prompts in the decoder, as float32
# Bytes that an ExecuTorch export takes for each value of its decoder: a tensor to trace, the packed bytes twice, and
# temporaries. Measured at int4 (1.7B: 7.07 GB at the peak of the whole export, when graphs that were lowered still lay
# in memory beside the next: an upper bound now); the others are reckoned from it by their bytes.
LOWERING_PER_VALUE: dict[Precision, float] = {"int4": 4.8, "int8": 5.7, "fp16": 8.7, "fp32": 14.7}
# Targets whose exporters keep to the estimate below; the others load the whole model.
STREAMED: tuple[Target, ...] = ("onnx", "executorch", "coreml")
CGROUP = Path("/sys/fs/cgroup")


def file_bytes(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe | Precision) -> int:
    """Bytes of all graphs' weights."""
    return sum(_stored_bytes(name, shape, recipe) for name, shape in shapes.items())


def _stored_bytes(name: str, shape: tuple[int, ...], recipe: Recipe | Precision) -> int:
    storage, values = storage_of(name, shape, recipe), math.prod(shape)
    scales = values / (storage.group_size or CHANNEL_BLOCK) * SCALE_BYTES if storage.bits in (4, 8) else 0
    return int(values * storage.bits / 8 + scales)


def disk_needed(
    shapes: Mapping[str, tuple[int, ...]], recipe: Recipe | Precision, questions: int, vocabulary: int
) -> int:
    """Bytes that the bundle takes."""
    logits = questions * (GREEDY_TOKENS + 1) * vocabulary * FLOAT_BYTES
    precision = recipe.precision if isinstance(recipe, Recipe) else recipe
    sets = 1 if precision == "fp32" else 2  # of golden vectors: the checkpoint's, and those of the stored weights
    return file_bytes(shapes, recipe) + sets * logits + SPARE_DISK_BYTES


def scratch_bytes(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of disk that are needed only while graphs are made: coremltools writes placeholders, and copies them."""
    return 2 * CONVERTED_BYTES * _decoder_values(shapes) if target == "coreml" else 0


def memory_needed(
    target: Target, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe | Precision, model: ModelShape
) -> int:
    """Bytes that a streamed export takes at its peak: conversion, the replay, or the largest parts as float32."""
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.context_length * FLOAT_BYTES
    layer = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("language_model.layers.0."))
    table = max(math.prod(shape) for shape in shapes.values())
    recording = FLOAT_BYTES * (layer + table) + cache + ACTIVATION_BYTES
    if target == "coreml":
        values = sum(math.prod(shape) for shape in shapes.values())
        converting = CONVERTED_BYTES * values + COPIES_BYTES * table
        return PROCESS_BYTES + max(converting, int(EVALUATED_BYTES * values) + cache, recording)
    replay = int(SESSION_PER_FILE_BYTE * file_bytes(shapes, recipe)) + cache
    precision = recipe.precision if isinstance(recipe, Recipe) else recipe
    lowering = int(LOWERING_PER_VALUE[precision] * _decoder_values(shapes)) if target == "executorch" else 0
    return PROCESS_BYTES + max(replay, recording, lowering)


def _decoder_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(s) for name, s in shapes.items() if name.startswith(("language_model.layers.", "lm_head.")))


def check_room(
    target: Target,
    output: Path,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    model: ModelShape,
    questions: int,
    codes: bool = False,
) -> None:
    """Refuse an export that this machine cannot finish.

    Args:
        codes: chosen codes, a byte a weight, lie in the work folder meanwhile.

    Raises:
        UsageError: too little disk or memory, with both numbers.
    """
    disk, scratch = disk_needed(shapes, recipe, questions, model.vocab_size), scratch_bytes(target, shapes)
    disk += sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2) if codes else 0
    free = free_disk_bytes(output.parent)
    if free < disk + scratch:
        more = f" and its conversion {scratch / GIB:.1f} GiB more" if scratch else ""
        raise UsageError(
            f"the bundle takes {disk / GIB:.1f} GiB of disk{more}, {output.parent} has {free / GIB:.1f} GiB free; make "
            "room or choose another --output"
        )
    if target not in STREAMED:
        return
    memory, available = memory_needed(target, shapes, recipe, model), available_memory_bytes()
    if available < memory:
        raise UsageError(
            f"the export takes about {memory / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are available; close "
            f"other programs, choose a smaller precision or a --context-length below {model.context_length}"
        )


def free_disk_bytes(folder: Path) -> int:
    """Free bytes where ``folder`` is or will be made."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def available_memory_bytes() -> int:
    """What this process can still take: of the machine, and of its container's limit."""
    available = int(psutil.virtual_memory().available)
    limit_file, stat_file = CGROUP / "memory.max", CGROUP / "memory.stat"
    if not limit_file.is_file() or not stat_file.is_file():
        return available
    limit = limit_file.read_text().strip()
    if limit == "max":
        return available
    stat = dict(line.split() for line in stat_file.read_text().splitlines())
    return min(available, int(limit) - int(stat["anon"]))  # file pages can be dropped


def release_free_memory() -> None:
    """Give memory that Python has freed back to the system, so that the next engine does not come on top of it.

    glibc keeps what the recording's activations took.
    """
    with suppress(OSError, AttributeError):  # another C library: it keeps what it keeps
        ctypes.CDLL("libc.so.6").malloc_trim(0)
