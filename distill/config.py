"""Flags of alignkd-distill -> frozen, checked settings; importing this needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bundle.errors import UsageError

Losses = Literal["paper", "ours", "published_code", "ce"]
OnBadImage = Literal["stop", "skip"]
PRESETS: dict[Losses, dict[str, float]] = {
    # the paper weighs its five terms equally (Align-KD, arXiv 2412.01282)
    "paper": {"cross_entropy": 1.0, "reverse_kl": 1.0, "attention": 1.0, "visual": 1.0, "focus": 1.0},
    # what won on the demo world: experiments/align_kd
    "ours": {"cross_entropy": 1.0, "forward_kl": 1.0, "attention_groups": 1.0},
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
TEMPERATURES: dict[Losses, float] = {"paper": 1.0, "ours": 4.0, "published_code": 1.0, "ce": 1.0}  # of the divergences


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
class CacheStorage:
    """How a teacher cache stores what the teacher says: bytes against error, see docs/teacher_cache.md."""

    words: int = 64
    """Words stored per position of the divergences: the likeliest ones, and the rest drawn without bias."""
    columns: int = 0
    """Visual tokens stored per text position of the attention KL, drawn without bias; 0 stores all."""
    features: bool = False
    """Also store the vision tower's features, so that training opens neither pictures nor tower."""
    precision: Literal["float16", "float32"] = "float16"
    """Of stored numbers; float32 takes twice the bytes and is for comparison."""


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


def term_weights(losses: Losses, weights: TermWeights) -> dict[str, float]:
    """Term -> weight after a preset and single weights; terms of weight 0 are left out."""
    given = {name: weight for name, weight in asdict(weights).items() if weight is not None}
    return {name: weight for name, weight in (PRESETS[losses] | given).items() if weight}


@dataclass(frozen=True)
class CacheConfig:
    """Record what a teacher says to every conversation of a data set; what a cache holds already is not run again."""

    cache: Path
    """Folder of the cache; made, or completed."""
    teacher: Path | None = None
    """Checkpoint that teaches."""
    data: Path | None = None
    """Data set, as in training."""
    images: Path | None = None
    """Folder of the images that the data names; default: the data file's folder."""
    student: Path | None = None
    """Checkpoint that will be trained, where its template or context length is not the teacher's, and for
    attention_groups, which asks for its number of layers."""
    losses: Losses = "paper"
    """As in training: decides what is recorded."""
    weights: TermWeights = field(default_factory=TermWeights)
    """As in training; only whether a weight is 0 matters."""
    temperature: float | None = None
    """As in training."""
    mask: Literal["answer", "answer+vision", "all"] = "answer"
    """As in training."""
    top_k: int = 16
    """As in training."""
    template: Literal["v1", "plain"] | None = None
    """As in training."""
    image_strategy: Literal["pad", "crop", "stretch"] | None = None
    """As in training."""
    on_bad_image: OnBadImage = "stop"
    """An image that cannot be read stops the recording, or its row is left out, counted and named."""
    storage: Annotated[CacheStorage, tyro.conf.arg(name="")] = field(default_factory=CacheStorage)
    """How to store it."""
    batch_size: int = 16
    """Conversations that the teacher looks at together."""
    shard_mb: int = 256
    """Size of a shard; a recording that is killed loses the shard that it was filling."""
    rank: int = 0
    """Which of --ranks processes this is; each records its own conversations into the same cache."""
    ranks: int = 1
    """How many processes record at the same time."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every shard and name those that are missing, truncated or altered; nothing is recorded."""
    mend: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Before recording, remove the shards that --verify would name; what they held is then recorded again."""

    def __post_init__(self) -> None:
        problems = []
        if not self.verify and (self.teacher is None or self.data is None):
            problems.append("recording needs --teacher DIR and --data FILE (or --verify, which needs neither)")
        if self.images is not None and not self.images.is_dir():
            problems.append(f"--images {self.images} is no folder")
        positive = {
            "temperature": 1 if self.temperature is None else self.temperature,
            "top-k": self.top_k, "words": self.storage.words,
            "batch-size": self.batch_size, "shard-mb": self.shard_mb, "ranks": self.ranks,
        }  # fmt: skip
        problems += [f"--{name} {value} must be above 0" for name, value in positive.items() if not value > 0]
        if self.storage.columns < 0:
            problems.append(f"--columns {self.storage.columns} must be 0 or more")
        if not 0 <= self.rank < max(1, self.ranks):
            problems.append(f"--rank {self.rank} must be from 0 up to below --ranks {self.ranks}")
        if self.mend and self.ranks > 1:
            problems.append("--mend is for one process: run it with --ranks 1 first")
        if not self.verify and set(self.term_weights) <= {"cross_entropy"}:
            problems.append(f"--losses {self.losses} asks nothing of a teacher; there is nothing to record")
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def term_weights(self) -> dict[str, float]:
        return term_weights(self.losses, self.weights)

    @property
    def image_folder(self) -> Path:
        assert self.data is not None
        if self.images is not None:
            return self.images
        return self.data if self.data.is_dir() else self.data.parent

    @property
    def divergence_temperature(self) -> float:
        return TEMPERATURES[self.losses] if self.temperature is None else self.temperature


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
