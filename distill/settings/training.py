"""Flags of a training run -> frozen, checked settings; importing this needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bundle.errors import UsageError
from distill.settings.terms import TEMPERATURES, Losses, TermWeights, term_weights

OnBadImage = Literal["stop", "skip"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank updates of the decoder instead of all its weights; projector and adapters are trained in full."""

    rank: int = 0
    """Rank of the updates; 0 trains the decoder's weights themselves."""
    alpha: int | None = None
    """The update is scaled by alpha / rank; default: twice the rank."""
    dropout: float = 0.0
    """On the input of the updates."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """The decoder's linear layers that get an update, by the end of their names."""

    @property
    def scale_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides a training run."""

    student: Path
    """Checkpoint to train from (ours or the published MobileVLM V2 layout); it is not changed."""
    data: Path
    """LLaVA JSON, HF messages (JSON, parquet) or tar shards (a folder, or s-{000000..000123}.tar)."""
    output: Path
    """New directory for the trained checkpoint; an unfinished run lies in OUTPUT.work beside it."""
    teacher: Path | None = None
    """Checkpoint that teaches; not needed for --losses ce."""
    cache: Path | None = None
    """Teacher cache made by ``alignkd-distill cache``: the teacher is not run (so the --teacher-* settings do nothing),
    and may be away from this disk."""
    images: Path | None = None
    """Folder of the images that the data names; default: the data file's folder."""
    losses: Losses = "paper"
    """paper: the five terms of Align-KD; ours: forward KL and attention KL by groups of layers; published_code: what
    the paper's code does instead; ce: cross entropy, no teacher."""
    weights: TermWeights = field(default_factory=TermWeights)
    """Change single weights."""
    temperature: float | None = None
    """Of the divergences; default: what --losses says (1 in the paper, 4 in ours)."""
    mask: Literal["answer", "answer+vision", "all"] = "answer"
    """Positions the divergences look at: those that predict an answer, these and the visual tokens, or all."""
    adapter_init: Literal["fit", "random"] = "fit"
    """Where the maps between visual tokens start: at their least-squares fit over training images, or at random. Random
    ones can begin so far off that clipping leaves nothing of the other terms."""
    shuffled_teacher: bool = False
    """A control: the teacher sees another row's picture. What still helps then is no knowledge of the picture."""
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
    template: Literal["v1", "plain"] | None = None
    """Prompt template to train and save with: plain captions (stage 1) or v1 conversations; default: the student's."""
    image_strategy: Literal["pad", "crop", "stretch"] | None = None
    """How pictures become square; default: as the student's checkpoint says (MobileVLM V2 pads)."""
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the teacher's weights and arithmetic."""
    teacher_bits: Literal["8", "4"] | None = None
    """Hold the matrices of the teacher's decoder as integers (torchao, weights only); needs the extra executorch."""
    teacher_placement: Literal["device", "cpu"] = "device"
    """cpu keeps the teacher's weights in host memory and brings each layer to the device while it runs."""
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
    """Of the maps between teacher and student."""
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
    """Train in bfloat16 autocast; weights and optimizer stay float32."""
    gradient_checkpointing: bool = False
    """Keep one activation per decoder layer and compute the rest again in the backward pass: less memory, slower."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Low-rank training."""
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
    on_bad_image: OnBadImage = "stop"
    """An image that cannot be read stops the run, or its row is left out of the batch, counted and named."""
    report: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where curves go: tensorboard writes to OUTPUT/tensorboard; wandb and trackio are packages of their own."""
    eval_data: Path | None = None
    """Held-out LLaVA JSON; its exact-match accuracy is logged and stands in the model card."""
    eval_steps: int = 500
    """Steps between evaluations on --eval-data; one more is made at the end."""
    eval_rows: int = 1000
    """Rows of --eval-data that are asked, evenly spread over the file."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the unfinished run in OUTPUT.work; a finished run is left as it is."""

    def __post_init__(self) -> None:
        problems = [problem for problem in (*self._paths(), *self._numbers()) if problem]
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def term_weights(self) -> dict[str, float]:
        """Term -> weight after the preset and the single weights; terms of weight 0 are left out."""
        return term_weights(self.losses, self.weights)

    @property
    def divergence_temperature(self) -> float:
        return TEMPERATURES[self.losses] if self.temperature is None else self.temperature

    @property
    def needs_teacher(self) -> bool:
        return bool(set(self.term_weights) - {"cross_entropy"})

    @property
    def image_folder(self) -> Path:
        if self.images is not None:
            return self.images
        return self.data if self.data.is_dir() else self.data.parent

    @property
    def work(self) -> Path:
        """Where an unfinished run lies."""
        return self.output.with_name(self.output.name + ".work")

    def _paths(self) -> list[str]:
        problems = []
        if self.needs_teacher and self.teacher is None and self.cache is None:
            problems.append(f"--losses {self.losses} needs --teacher DIR (or train without one: --losses ce)")
        if self.images is not None and not self.images.is_dir():
            problems.append(f"--images {self.images} is no folder")
        if self.teacher_bits and self.teacher_placement == "cpu":
            problems.append(
                "--teacher-bits keeps the teacher on the device; --teacher-placement cpu is for whole weights"
            )
        if self.shuffled_teacher and self.cache is not None:
            problems.append("--shuffled-teacher needs a teacher that runs; leave --cache out")
        return problems

    def _numbers(self) -> list[str]:
        positive = {
            "temperature": 1 if self.temperature is None else self.temperature,
            "top-k": self.top_k, "epochs": self.epochs, "batch-size": self.batch_size,
            "gradient-accumulation": self.gradient_accumulation, "learning-rate": self.learning_rate,
            "adapter-learning-rate": self.adapter_learning_rate, "log-steps": self.log_steps,
            "save-steps": self.save_steps, "eval-steps": self.eval_steps, "eval-rows": self.eval_rows,
            "max-steps": 1 if self.max_steps is None else self.max_steps,
            "projector-learning-rate": 1 if self.projector_learning_rate is None else self.projector_learning_rate,
        }  # fmt: skip
        not_negative = {
            "weight-decay": self.weight_decay, "max-grad-norm": self.max_grad_norm,
            "grad-norm-steps": self.grad_norm_steps, "cache-mb": self.cache_mb, "workers": self.workers,
            "taught-share-end": self.taught_share_end, "seed": self.seed, "lora.rank": self.lora.rank,
            **{f"weights.{name.replace('_', '-')}": weight or 0.0 for name, weight in asdict(self.weights).items()},
        }  # fmt: skip
        problems = [f"--{name} {value} must be above 0" for name, value in positive.items() if not value > 0]
        problems += [f"--{name} {value} must be 0 or more" for name, value in not_negative.items() if not value >= 0]
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"--label-smoothing {self.label_smoothing} must be from 0 up to below 1")
        if not 0 <= self.warmup < 1:
            problems.append(f"--warmup {self.warmup} must be a part of the run, from 0 up to below 1")
        if not 0 <= self.lora.dropout < 1:
            problems.append(f"--lora.dropout {self.lora.dropout} must be from 0 up to below 1")
        if self.lora.alpha is not None and not self.lora.alpha > 0:
            problems.append(f"--lora.alpha {self.lora.alpha} must be above 0")
        if not self.term_weights:
            problems.append("every loss term has weight 0; give one a weight, e.g. --weights.cross-entropy 1")
        return problems
