"""Student's and teacher's look at the images of a batch -> terms of their attention and of their visual tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from distill.losses.attention import attention_kl, attention_mse, focus_tokens
from distill.losses.visual import normed_visual_mse, picked_mse, relation_distance, visual_mse
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import Roles, Spans, spans_of, text_to_image_attention
from distill.settings.terms import ATTENTION_TERMS, VISUAL_TERMS, TermSettings
from distill.teacher.bridge import on_students_grid
from distill.teacher.view import TeacherView


@dataclass(frozen=True)
class Adapters:
    """The maps between teacher and student that the chosen terms need.

    Attributes:
        heads: teacher's heads -> student's.
        to_student, to_teacher: visual tokens to the other's width.
    """

    heads: nn.Conv2d | None
    to_student: nn.Linear | None
    to_teacher: nn.Linear | None


def image_terms(
    names: Collection[str],
    vlm: MobileVlm,
    student: Roles,
    teacher: TeacherView,
    adapters: Adapters,
    settings: TermSettings,
) -> dict[str, torch.Tensor]:
    """Those of ``names`` that look at images; 0 for a batch without one. ``vlm`` is the student."""
    ours = student.expanded.visual_tokens  # [n, N, D_S]
    if ours is None:
        zero = student.hidden.sum() * 0.0
        return {name: zero for name in ATTENTION_TERMS + VISUAL_TERMS if name in names}
    spans = spans_of(student.expanded)
    teacher = on_students_grid(teacher, ours.shape[1])
    terms = _attention_terms(names, vlm, student, teacher, spans, adapters.heads, settings)
    if teacher.visual is not None:
        terms |= _visual_terms(names, ours, teacher.visual, teacher, spans, adapters, settings.top_k)
    return terms


def _attention_terms(
    names: Collection[str],
    vlm: MobileVlm,
    student: Roles,
    teacher: TeacherView,
    spans: Spans,
    head_map: nn.Conv2d | None,
    settings: TermSettings,
) -> dict[str, torch.Tensor]:
    terms, mask, by_mass = {}, spans.row_mask, settings.attention_by_mass
    if teacher.attention is not None and ("attention" in names or "attention_kl" in names):
        block = text_to_image_attention(vlm, student, spans)  # [n, H_S, R, N]
        if "attention" in names:
            assert head_map is not None
            terms["attention"] = attention_mse(block, head_map(teacher.attention.to(head_map.weight.dtype)), mask)
        if "attention_kl" in names:
            terms["attention_kl"] = attention_kl(block, teacher.attention, mask, by_mass)
    if teacher.group_attention is not None:
        layers = [
            attention_kl(text_to_image_attention(vlm, student, spans, layer), group, mask, by_mass)
            for layer, group in enumerate(teacher.group_attention)
        ]
        terms["attention_groups"] = torch.stack(layers).mean()
    return terms


def _visual_terms(
    names: Collection[str],
    ours: torch.Tensor,
    theirs: torch.Tensor,
    teacher: TeacherView,
    spans: Spans,
    adapters: Adapters,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """ours [n, N, D_S], theirs [n, N, D_T]."""
    terms, theirs = {}, theirs.to(ours.dtype)  # a teacher may be held in bfloat16
    if adapters.to_student is not None:
        mapped = adapters.to_student(theirs)  # [n, N, D_S]
        if "visual" in names:
            terms["visual"] = visual_mse(ours, mapped)
        if "focus" in names:
            focus = teacher.focus  # [n, k]
            if focus is None:
                assert teacher.attention is not None
                focus = focus_tokens(teacher.attention, spans.row_mask, top_k)
            terms["focus"] = picked_mse(ours, mapped, focus)
    if adapters.to_teacher is not None:
        terms["normed_visual"] = normed_visual_mse(adapters.to_teacher(ours), theirs)
    if "relation" in names:
        terms["relation"] = relation_distance(ours, theirs)
    return terms
