"""Student, teacher, term weights -> AlignKD: one batch in, {term: loss} out; the adapters are part of the module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.losses import (
    RowDivergence,
    attention_kl,
    attention_mse,
    cross_entropy_rows,
    focus_mse,
    forward_kl_rows,
    jensen_shannon_rows,
    log_probabilities,
    reverse_kl_rows,
    skew_kl_rows,
    visual_mse,
)
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import (
    Roles,
    look,
    spans_of,
    supervised_rows,
    text_to_image_attention,
    tower_hash,
    unused_tower_parameters,
)

DIVERGENCES: dict[str, RowDivergence] = {
    "reverse_kl": reverse_kl_rows,
    "forward_kl": forward_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "skew_kl": partial(skew_kl_rows, skew=0.1),  # DistiLLM's alpha
}
ATTENTION_TERMS = ("attention", "attention_kl")
VISUAL_TERMS = ("visual", "focus")
TERMS = ("cross_entropy", *DIVERGENCES, *ATTENTION_TERMS, *VISUAL_TERMS)
MAX_LOGITS = 1 << 22  # logits of one model alive at a time: 16 MiB in float32


class AlignKD(nn.Module):
    """The trained module: the student, and the maps from the teacher's heads and width to the student's.

    The teacher is held but not registered: it is in no optimizer, no checkpoint and no mode change.

    Args:
        student: trained in place; its tower stays frozen unless ``freeze_tower`` is False.
        teacher: frozen; None when ``weights`` name cross entropy alone.
        weights: term -> weight; terms that are absent are not computed.
        temperature: of the divergences.
        top_k: visual tokens of the focus term.
        seed: of the adapters' initial values.
    """

    def __init__(
        self,
        student: MobileVlm,
        teacher: MobileVlm | None,
        weights: Mapping[str, float],
        temperature: float = 1.0,
        top_k: int = 16,
        freeze_tower: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert set(weights) <= set(TERMS), weights
        assert teacher is not None or set(weights) <= {"cross_entropy"}
        self.student = student.requires_grad_(True)
        student.vision_tower.requires_grad_(not freeze_tower)
        for parameter in unused_tower_parameters(student):
            parameter.requires_grad_(False)
        self.weights = dict(weights)
        self.temperature, self.top_k, self.freeze_tower = temperature, top_k, freeze_tower
        self._teacher = (teacher.requires_grad_(False).eval(),) if teacher is not None else ()
        self.shares_tower = teacher is not None and freeze_tower and tower_hash(teacher) == tower_hash(student)
        self.head_map: nn.Conv2d | None = None
        self.visual_map: nn.Linear | None = None
        if teacher is not None:
            self._make_adapters(teacher, seed)

    def _make_adapters(self, teacher: MobileVlm, seed: int) -> None:
        theirs, ours = teacher.config.text_config, self.student.config.text_config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if "attention" in self.weights:
                self.head_map = nn.Conv2d(theirs.num_attention_heads, ours.num_attention_heads, 1)
            if self._uses(VISUAL_TERMS):
                self.visual_map = nn.Linear(theirs.hidden_size, ours.hidden_size)

    @property
    def teacher(self) -> MobileVlm | None:
        """The frozen teacher, outside of this module's parameters."""
        return self._teacher[0] if self._teacher else None

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapters' tensors by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("student.")}

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of the terms."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One batch -> unweighted terms.

        Args:
            input_ids, attention_mask, labels: [B, T], one image id per image.
            pixel_values: [n, 3, S, S] in reading order; or
            image_features: [n, P, D_v], features of a tower that student and teacher share.
        """
        features = self._features(self.student, pixel_values, image_features)
        student = look(self.student, input_ids, attention_mask, labels, features)
        if self.teacher is None:
            return self._row_terms(student, None)
        with torch.no_grad():
            seen = features if self.shares_tower else self._features(self.teacher, pixel_values, image_features)
            teacher = look(self.teacher, input_ids, attention_mask, labels, seen)
        terms = self._row_terms(student, teacher)
        if self._uses(ATTENTION_TERMS + VISUAL_TERMS):
            terms |= self._image_terms(self.teacher, student, teacher)
        return terms

    def _uses(self, names: tuple[str, ...]) -> bool:
        return any(name in self.weights for name in names)

    def _features(self, vlm: MobileVlm, pixels: torch.Tensor | None, known: torch.Tensor | None) -> torch.Tensor | None:
        if known is not None or pixels is None:
            return known
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_tower):
            return vlm.tower_features(pixels)  # [n, P, D_v]

    def _row_terms(self, student: Roles, teacher: Roles | None) -> dict[str, torch.Tensor]:
        """Cross entropy and divergences, lm_head and both softmaxes run on supervised rows alone, a chunk at a time."""
        hidden, targets = supervised_rows(student)  # [S, D], [S]
        theirs = supervised_rows(teacher)[0] if teacher is not None else hidden[:, :0]  # [S, D_T]
        rows = max(1, MAX_LOGITS // self.student.config.text_config.vocab_size)
        chunks = zip(hidden.split(rows), theirs.split(rows), targets.split(rows), strict=True)
        if len(targets) <= rows:
            parts = [self._chunk_terms(*chunk) for chunk in chunks]
        else:  # recomputed in the backward pass, so that no two chunks' logits are alive together
            parts = [checkpoint(self._chunk_terms, *chunk, use_reentrant=False) for chunk in chunks]
        count = max(1, len(targets))
        return {name: torch.stack([part[name] for part in parts]).sum() / count for name in parts[0]}

    def _chunk_terms(
        self, hidden: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Sums over a chunk's rows. hidden [c, D], theirs [c, D_T], targets [c]."""
        logits = self.student.lm_head(hidden)  # [c, V]
        terms = {}
        if "cross_entropy" in self.weights:
            terms["cross_entropy"] = cross_entropy_rows(logits, targets).sum()
        if self.teacher is not None and self._uses(tuple(DIVERGENCES)):
            with torch.no_grad():
                log_teacher = log_probabilities(self.teacher.lm_head(theirs), self.temperature)  # [c, V]
            log_student = log_probabilities(logits, self.temperature)  # [c, V]
            for name, divergence in DIVERGENCES.items():
                if name in self.weights:
                    terms[name] = divergence(log_student, log_teacher).sum() * self.temperature**2
        return terms

    def _image_terms(self, teacher_vlm: MobileVlm, student: Roles, teacher: Roles) -> dict[str, torch.Tensor]:
        ours, theirs = student.expanded.visual_tokens, teacher.expanded.visual_tokens  # [n, N, D_S], [n, N, D_T]
        terms = {}
        if ours is None or theirs is None:
            zero = student.hidden.sum() * 0.0
            return {name: zero for name in ATTENTION_TERMS + VISUAL_TERMS if name in self.weights}
        spans = spans_of(student.expanded)
        with torch.no_grad():
            their_block = text_to_image_attention(teacher_vlm, teacher.expanded, spans)  # [n, H_T, R, N]
        if self._uses(ATTENTION_TERMS):
            block = text_to_image_attention(self.student, student.expanded, spans)  # [n, H_S, R, N]
        if self.head_map is not None:
            terms["attention"] = attention_mse(block, self.head_map(their_block), spans.row_mask)
        if "attention_kl" in self.weights:
            terms["attention_kl"] = attention_kl(block, their_block, spans.row_mask)
        if self.visual_map is not None:
            mapped = self.visual_map(theirs)  # [n, N, D_S]
            if "visual" in self.weights:
                terms["visual"] = visual_mse(ours, mapped)
            if "focus" in self.weights:
                terms["focus"] = focus_mse(ours, mapped, their_block, spans.row_mask, self.top_k)
        return terms
