"""Flags of ``alignkd-distill cache`` -> frozen, checked settings: what is recorded of a teacher, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bundle.errors import UsageError
from distill.settings.terms import TEMPERATURES, Losses, TermWeights, term_weights
from distill.settings.training import OnBadImage


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
