"""Sizes of a run and its engine -> bytes per GPU: weights, gradients, optimizer, teacher and activations, by formulas.

Weights, gradients and optimizer are exact: float32 weights and gradients, AdamW's two float32 moments and one float32
step count a tensor, divided over the GPUs where the engine shards them. Activations are an estimate, within a tenth of
what torch 2.13 keeps for LLaMA's layers: per token and layer 40 D + 16 I + 6 H bytes in float32, 34 D + 8 I + 6 H under
bfloat16 autocast (D width, I width inside the MLP, H heads; SDPA keeps no attention map); with gradient checkpointing
4 D per layer and one whole layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
FLOAT = 4  # bytes of a float32
SHARDS_WEIGHTS: tuple[Engine, ...] = ("fsdp2", "zero3")
SHARDS_GRADIENTS: tuple[Engine, ...] = ("fsdp2", "zero2", "zero3")
LIVE_LOGIT_TABLES = 6  # [rows, V] float32 alive at once: logits and softmaxes of both models, and their gradients


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that decide its activations."""

    hidden: int
    intermediate: int
    heads: int
    layers: int

    def layer_bytes(self, bf16: bool) -> int:
        """What one layer keeps for the backward pass per token."""
        width, inside = (34, 8) if bf16 else (40, 16)
        return width * self.hidden + inside * self.intermediate + 6 * self.heads


@dataclass(frozen=True)
class Sizes:
    """What the memory of a run depends on.

    Attributes:
        student: parameters of the student and the adapters, frozen ones included.
        trained: those with a gradient; ``trained_tensors`` how many tensors they are.
        borrowed: parameters of the parts that FSDP2 gathers for the whole step: embedding, first layer, lm_head,
            projector, adapters.
        layer: parameters of one decoder layer.
        teacher_bytes: of the teacher's weights on the device; 0 without one.
        decoder, teacher_decoder: sizes of the decoders; None without a teacher.
        tokens: positions of a micro batch, padding and visual tokens included.
        logit_values: values of one chunk of logits.
    """

    student: int
    trained: int
    trained_tensors: int
    borrowed: int
    layer: int
    teacher_bytes: int
    decoder: Decoder
    teacher_decoder: Decoder | None
    tokens: int
    logit_values: int


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.teacher + self.activations


def memory_per_gpu(sizes: Sizes, engine: Engine, gpus: int, bf16: bool, checkpointing: bool) -> Memory:
    """Bytes on each of ``gpus`` GPUs."""
    weights = FLOAT * sizes.student
    gradients = FLOAT * sizes.trained
    optimizer = 2 * FLOAT * sizes.trained + FLOAT * sizes.trained_tensors
    compute = 2 if bf16 else FLOAT
    gathered = compute * sizes.trained if bf16 else 0  # autocast's copies of the weights
    if engine in SHARDS_WEIGHTS:
        weights = _share(weights, gpus)
        gathered = compute * (sizes.borrowed + 2 * sizes.layer)  # this layer and the next, prefetched
    if engine in SHARDS_GRADIENTS:
        gradients, optimizer = _share(gradients, gpus), _share(optimizer, gpus)
    return Memory(
        weights, gradients, optimizer, gathered, sizes.teacher_bytes, _activations(sizes, bf16, checkpointing)
    )


def _activations(sizes: Sizes, bf16: bool, checkpointing: bool) -> int:
    decoder, layer = sizes.decoder, sizes.decoder.layer_bytes(bf16)
    kept = layer + FLOAT * decoder.hidden * decoder.layers if checkpointing else layer * decoder.layers
    logits = LIVE_LOGIT_TABLES * FLOAT * sizes.logit_values
    teacher = sizes.teacher_decoder
    passing = FLOAT * (4 * teacher.hidden + 3 * teacher.intermediate) if teacher else 0  # one layer, nothing is kept
    return sizes.tokens * max(kept, passing) + logits


def _share(count: int, gpus: int) -> int:
    return -(-count // gpus)
