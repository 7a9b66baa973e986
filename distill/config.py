"""Flags of alignkd-distill -> frozen, checked settings; importing this needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bundle.errors import UsageError

Losses = Literal["paper", "published_code", "ce"]
PRESETS: dict[Losses, dict[str, float]] = {
    # the paper weighs its five terms equally (Align-KD, arXiv 2412.01282)
    "paper": {"cross_entropy": 1.0, "reverse_kl": 1.0, "attention": 1.0, "visual": 1.0, "focus": 1.0},
    # what the authors' code computes instead, for comparison only: distill/published_code.py
    "published_code": {
        "cross_entropy": 1.0,
        "published_logits": 1.0,
        "published_attention": 1.0,
        "visual": 1.0,
        "published_focus": 1.0,
    },
    "ce": {"cross_entropy": 1.0},
}


@dataclass(frozen=True)
class TermWeights:
    """Weight of each loss term; unset keeps what --losses says, 0 switches the term off."""

    cross_entropy: float | None = None
    """Next-token cross entropy on the answers."""
    reverse_kl: float | None = None
    """KL(student || teacher) on the answers, the paper's."""
    forward_kl: float | None = None
    """KL(teacher || student) on the answers."""
    jensen_shannon: float | None = None
    """Jensen-Shannon divergence on the answers."""
    skew_kl: float | None = None
    """DistiLLM's skew KL (0.1) on the answers."""
    adaptive_kl: float | None = None
    """Forward KL on the teacher's likely words, reverse KL on the others, by where the student is off."""
    cosine: float | None = None
    """1 - cosine of the two distributions."""
    attention: float | None = None
    """Mean square of the first layer's text-to-image attention through a learned head map, the paper's."""
    attention_kl: float | None = None
    """KL of the same attention, head mean renormalised over the image; scale-free, without a map."""
    attention_groups: float | None = None
    """The same in every layer of the student, against the teacher's layers at that depth."""
    visual: float | None = None
    """Mean square of all visual tokens through a learned width map, the paper's V-all."""
    focus: float | None = None
    """The same over the visual tokens that the teacher's text looks at most, the paper's V-focus."""
    normed_visual: float | None = None
    """Mean square of layer-normed visual tokens, the student's mapped to the teacher's width."""
    relation: float | None = None
    """1 - cosine of the visual tokens' Gram matrices; without a map."""
    published_logits: float | None = None
    """The published code's logits term: every position, float16."""
    published_attention: float | None = None
    """The published code's attention term: a constant."""
    published_focus: float | None = None
    """The published code's focus term: wrongly indexed tokens."""


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides a training run."""

    student: Path
    """Checkpoint to train from (ours or the published MobileVLM V2 layout); it is not changed."""
    data: Path
    """LLaVA JSON: a list of conversations with or without an image."""
    output: Path
    """New directory for the trained checkpoint; an unfinished run lies in OUTPUT.work beside it."""
    teacher: Path | None = None
    """Checkpoint that teaches; not needed for --losses ce."""
    images: Path | None = None
    """Folder of the images that the data names; default: the data file's folder."""
    losses: Losses = "paper"
    """paper: the five terms of Align-KD; published_code: what its code does instead; ce: cross entropy, no teacher."""
    weights: TermWeights = field(default_factory=TermWeights)
    """Change single weights."""
    temperature: float = 1.0
    """Of the divergences; 1 in the paper."""
    mask: Literal["answer", "answer+vision", "all"] = "answer"
    """Positions the divergences look at: those that predict an answer, these and the visual tokens, or all."""
    adapter_init: Literal["random", "fit"] = "random"
    """fit: the maps between visual tokens start at the least-squares fit over training images."""
    taught_share_end: float = 1.0
    """Share of the distillation terms' weights that is left at the end; it falls linearly from 1."""
    learned_balance: bool = False
    """Learn the distillation terms' weights as their uncertainties (Kendall et al. 2018)."""
    label_smoothing: float = 0.0
    """Of the cross entropy."""
    attention_by_mass: bool = False
    """The attention KLs weigh a text position by how much the teacher looks at the image there."""
    top_k: int = 16
    """Visual tokens per image in the focus term; 16 in the paper."""
    epochs: float = 1.0
    """Passes over the data; ignored when --max-steps is given."""
    max_steps: int | None = None
    """Optimizer steps in all."""
    batch_size: int = 16
    """Conversations per device and step."""
    gradient_accumulation: int = 1
    """Batches per optimizer step."""
    learning_rate: float = 4e-5
    """Of the decoder; MobileVLM V2's second stage uses 4e-5."""
    projector_learning_rate: float | None = None
    """Of the projector; default: the decoder's (MobileVLM V2's first stage uses 1e-3)."""
    adapter_learning_rate: float = 1e-3
    """Of the maps between teacher and student, which start at random."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: float = 0.03
    """Part of the run in which the learning rate rises."""
    weight_decay: float = 0.0
    """Of AdamW; 0 in the paper."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    freeze_tower: bool = True
    """Keep the vision tower as it is; its features are then computed once."""
    bf16: bool = False
    """Train in bfloat16 autocast; for GPUs that have it."""
    seed: int = 0
    """Of the batch order and the adapters."""
    log_steps: int = 10
    """Steps between log entries."""
    grad_norm_steps: int = 100
    """Steps between measurements of each term's own gradient norm; 0 switches them off."""
    save_steps: int = 500
    """Steps between resumable checkpoints."""
    cache_mb: int = 2048
    """Memory for tower features or decoded images; what does not fit is computed again."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    report: Literal["none", "tensorboard"] = "none"
    """tensorboard writes events to OUTPUT/tensorboard."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the unfinished run in OUTPUT.work; a finished run is left as it is."""

    def __post_init__(self) -> None:
        problems = [problem for problem in (*self._paths(), *self._numbers()) if problem]
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def term_weights(self) -> dict[str, float]:
        """Term -> weight after the preset and the single weights; terms of weight 0 are left out."""
        given = {name: weight for name, weight in asdict(self.weights).items() if weight is not None}
        return {name: weight for name, weight in (PRESETS[self.losses] | given).items() if weight}

    @property
    def needs_teacher(self) -> bool:
        return bool(set(self.term_weights) - {"cross_entropy"})

    @property
    def image_folder(self) -> Path:
        return self.images if self.images is not None else self.data.parent

    @property
    def work(self) -> Path:
        """Where an unfinished run lies."""
        return self.output.with_name(self.output.name + ".work")

    def _paths(self) -> list[str]:
        problems = []
        if self.needs_teacher and self.teacher is None:
            problems.append(f"--losses {self.losses} needs --teacher DIR (or train without one: --losses ce)")
        if self.images is not None and not self.images.is_dir():
            problems.append(f"--images {self.images} is no folder")
        return problems

    def _numbers(self) -> list[str]:
        positive = {
            "temperature": self.temperature, "top-k": self.top_k, "epochs": self.epochs, "batch-size": self.batch_size,
            "gradient-accumulation": self.gradient_accumulation, "learning-rate": self.learning_rate,
            "adapter-learning-rate": self.adapter_learning_rate, "log-steps": self.log_steps,
            "save-steps": self.save_steps,
            "max-steps": 1 if self.max_steps is None else self.max_steps,
            "projector-learning-rate": 1 if self.projector_learning_rate is None else self.projector_learning_rate,
        }  # fmt: skip
        not_negative = {
            "weight-decay": self.weight_decay, "max-grad-norm": self.max_grad_norm,
            "grad-norm-steps": self.grad_norm_steps, "cache-mb": self.cache_mb, "workers": self.workers,
            "taught-share-end": self.taught_share_end,
            "seed": self.seed,
            **{f"weights.{name.replace('_', '-')}": weight or 0.0 for name, weight in asdict(self.weights).items()},
        }  # fmt: skip
        problems = [f"--{name} {value} must be above 0" for name, value in positive.items() if not value > 0]
        problems += [f"--{name} {value} must be 0 or more" for name, value in not_negative.items() if not value >= 0]
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"--label-smoothing {self.label_smoothing} must be from 0 up to below 1")
        if not 0 <= self.warmup < 1:
            problems.append(f"--warmup {self.warmup} must be a part of the run, from 0 up to below 1")
        if not self.term_weights:
            problems.append("every loss term has weight 0; give one a weight, e.g. --weights.cross-entropy 1")
        return problems


@dataclass(frozen=True)
class InitConfig:
    """Sizes of a fresh student that sees through its teacher's tower."""

    teacher: Path
    """Checkpoint that gives tower, vocabulary and processing."""
    output: Path
    """New directory for the student checkpoint."""
    hidden_size: int
    """Width of the decoder."""
    layers: int
    """Decoder layers."""
    heads: int
    """Attention heads."""
    intermediate_size: int
    """Width inside the decoder's MLPs."""
    seed: int = 0
    """Of the initial weights."""
