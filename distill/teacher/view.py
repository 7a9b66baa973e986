"""A teacher and a batch -> TeacherView: what the losses need of the teacher, running now or recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from distill.losses.divergences import log_probabilities
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import Roles, predicting_rows, spans_of, text_to_image_attention


class TeacherRows(Protocol):
    """The teacher's output distributions on the rows that the divergences look at."""

    def split(self, rows: int) -> Sequence[TeacherRows]:
        """The same in pieces of at most ``rows`` rows."""

    def beside(self, log_student: torch.Tensor) -> Sides:
        """The rows next to a student's log-probabilities [c, V]."""


class Sides(Protocol):
    """Teacher and student on the same rows."""

    def on(self, divergence: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What a divergence takes: both sides' log-probabilities [c, W] on the words that the teacher's side knows."""


@dataclass(frozen=True)
class TeacherView:
    """What the losses need of the teacher for one batch; parts that no term asks for are None.

    Attributes:
        rows: output distributions on the predicting rows.
        attention: [n, H_T, R, N], the first layer's text-to-image attention; H_T is 1 where heads were averaged.
        group_attention: one head-mean block [n, 1, R, N] per decoder layer of the student.
        focus: [n, k], the visual tokens that the teacher's text looks at most, where they were recorded.
        visual: [n, N, D_T], projected visual tokens.
    """

    rows: TeacherRows | None = None
    attention: torch.Tensor | None = None
    group_attention: tuple[torch.Tensor, ...] | None = None
    focus: torch.Tensor | None = None
    visual: torch.Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """Which parts of a TeacherView the chosen terms ask for.

    Args:
        rows: the divergences' mask, or None without a divergence.
        temperature: of the distributions.
        attention: the first layer's block.
        groups: decoder layers of the student, when its every layer is compared with a group of teacher layers; else 0.
        visual: projected visual tokens.
    """

    rows: str | None
    temperature: float
    attention: bool
    groups: int
    visual: bool


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a teacher that the adapters are made for."""

    heads: int
    width: int


@dataclass(frozen=True)
class WholeSides:
    """Both sides on the whole vocabulary."""

    log_student: torch.Tensor  # [c, V]
    log_teacher: torch.Tensor  # [c, V]

    def on(self, divergence: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.log_student, self.log_teacher


@dataclass(frozen=True)
class LiveRows:
    """Hidden states of a teacher that runs now; its lm_head is applied a piece at a time."""

    hidden: torch.Tensor  # [S, D_T]
    lm_head: nn.Module
    temperature: float

    def split(self, rows: int) -> list[LiveRows]:
        return [LiveRows(part, self.lm_head, self.temperature) for part in self.hidden.split(rows)]

    def beside(self, log_student: torch.Tensor) -> WholeSides:
        log_teacher = self.log_probabilities()  # [c, V_T]
        common = min(log_student.shape[-1], log_teacher.shape[-1])
        return WholeSides(_among(log_student, common), _among(log_teacher, common))

    @torch.no_grad()
    def log_probabilities(self) -> torch.Tensor:
        """All words' [S, V]."""
        return log_probabilities(self.lm_head(self.hidden), self.temperature)


def _among(log_words: torch.Tensor, common: int) -> torch.Tensor:
    """Log-probabilities [c, V] -> [c, common], of the first words alone: rows past them are padding or added tokens."""
    return log_words if log_words.shape[-1] == common else log_words[:, :common].log_softmax(-1)


@torch.no_grad()
def live_view(teacher: MobileVlm, seen: Roles, wanted: Wanted) -> TeacherView:
    """What a teacher that has just looked at the batch gives; for groups, ``seen`` holds every layer's input."""
    rows = None
    if wanted.rows is not None:
        rows = LiveRows(predicting_rows(seen, wanted.rows)[0], teacher.lm_head, wanted.temperature)
    visual = seen.expanded.visual_tokens  # [n, N, D_T]
    if visual is None:
        return TeacherView(rows)
    spans = spans_of(seen.expanded)
    attention = text_to_image_attention(teacher, seen, spans) if wanted.attention else None
    groups = None
    if wanted.groups:
        layers = [
            text_to_image_attention(teacher, seen, spans, layer).mean(1, keepdim=True)  # [n, 1, R, N]
            for layer in range(len(seen.layer_inputs))
        ]
        groups = tuple(torch.stack(layers[a:b]).mean(0) for a, b in group_bounds(wanted.groups, len(layers)))
    return TeacherView(rows, attention, groups, visual=visual if wanted.visual else None)


def group_bounds(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Student layer -> the [first, last) teacher layers at the same relative depth, at least one each."""
    bounds = []
    for layer in range(student_layers):
        first = layer * teacher_layers // student_layers
        bounds.append((first, max(first + 1, (layer + 1) * teacher_layers // student_layers)))
    return bounds
