"""Two models' view of a batch -> the logits, attention and focus terms as the published Align-KD code computes them.

For comparison only (``--losses published_code``). Facts read from that code and seen by running it on tiny weights:

- the logits term is a forward cross entropy over every position, image, prompt and padding included, both
  softmaxes in float16;
- the attention mask selects vision queries x text keys, which causality makes 0 in both models, so that the term is the
  mean square of the head map's bias: a constant, without a gradient into the student;
- the focus term picks among all keys and query rows, moves the indexes by 2, and reads visual tokens there (negative
  ones from the end; the original crashes past the end, here they wrap);
- the maps between teacher and student are in no optimizer.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from distill.losses.visual import visual_mse
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import Roles, attention_rows
from distill.settings.terms import PUBLISHED_TERMS

INDEX_OFFSET = 2  # what the code takes off the indexes of the keys


def published_terms(
    names: Collection[str],
    vlms: tuple[MobileVlm, MobileVlm],
    views: tuple[Roles, Roles],
    head_map: nn.Conv2d | None,
    visual_map: nn.Linear | None,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """Those of ``names`` that are the published code's; as there, a batch with a row without an image has none of them.

    Args:
        vlms, views: student and teacher, and what each saw of the batch at every position.
        head_map, visual_map: teacher -> student, as they came out of the random generator.
    """
    (student_vlm, teacher_vlm), (student, teacher) = vlms, views
    ours, theirs = student.expanded.visual_tokens, teacher.expanded.visual_tokens  # [n, N, D_S], [n, N, D_T]
    terms = {}
    every_row_has_one = ours is not None and len(ours) == len(student.hidden)
    if not every_row_has_one or ours is None or theirs is None:
        return {name: student.hidden.sum() * 0.0 for name in PUBLISHED_TERMS if name in names}
    if "published_logits" in names:
        terms["published_logits"] = published_logits(
            student_vlm.lm_head(student.hidden), teacher_vlm.lm_head(teacher.hidden)
        )
    if "published_attention" in names:
        assert head_map is not None
        terms["published_attention"] = published_attention(head_map)
    if "published_focus" in names:
        assert visual_map is not None
        mapped = visual_map(theirs.to(ours.dtype))  # [n, N, D_S]
        terms["published_focus"] = published_focus(ours, mapped, teacher_vlm, teacher, top_k)
    return terms


def published_logits(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the student under the teacher's distribution, mean over all positions. Both logits [B, L, V]."""
    soft = teacher.softmax(-1, dtype=torch.float16)  # [B, L, V]
    return -(soft * student.log_softmax(-1, dtype=torch.float16)).sum(-1).mean().float()


def published_attention(head_map: nn.Conv2d) -> torch.Tensor:
    """Mean square of the head map's bias: what is left of the term where both blocks are 0."""
    assert head_map.bias is not None
    return head_map.bias.square().mean()


def published_focus(
    student: torch.Tensor, mapped: torch.Tensor, teacher_vlm: MobileVlm, seen: Roles, top_k: int
) -> torch.Tensor:
    """The focus term on the wrongly indexed tokens.

    Args:
        student: visual tokens [n, N, D_S], one image per conversation.
        mapped: the teacher's, mapped to the student's width [n, N, D_S].
        seen: the teacher's view of the batch.
    """
    kinds = seen.expanded.kinds  # [B, L]
    every = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)  # [B, L]
    sample = torch.arange(kinds.shape[0], device=kinds.device)
    weights = attention_rows(teacher_vlm, seen.layer_inputs[0], sample, every)  # [B, H, L, L]
    raw = weights.mean(1).sum(1).topk(min(top_k, student.shape[1]), dim=-1).indices  # [B, k] over all keys
    picked = (raw - INDEX_OFFSET) % student.shape[1]
    index = picked[..., None].expand(-1, -1, student.shape[-1])
    return visual_mse(student.gather(1, index), mapped.gather(1, index))
