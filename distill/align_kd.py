"""Student, teacher, term weights -> AlignKD: one batch in, {term: loss} out; the adapters are part of the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.losses import (
    RowDivergence,
    adaptive_kl_rows,
    attention_kl,
    attention_mse,
    cosine_rows,
    cross_entropy_rows,
    focus_mse,
    forward_kl_rows,
    jensen_shannon_rows,
    log_probabilities,
    normed_visual_mse,
    relation_distance,
    reverse_kl_rows,
    skew_kl_rows,
    visual_mse,
)
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import (
    Roles,
    Spans,
    look,
    predicting_rows,
    spans_of,
    text_to_image_attention,
    tower_hash,
    unused_tower_parameters,
)
from distill.published_code import published_attention, published_focus, published_logits
from distill.teacher_view import TeacherRows, TeacherView, Wanted, live_view

DIVERGENCES: dict[str, RowDivergence] = {
    "reverse_kl": reverse_kl_rows,
    "forward_kl": forward_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "skew_kl": partial(skew_kl_rows, skew=0.1),  # DistiLLM's alpha
    "adaptive_kl": adaptive_kl_rows,
    "cosine": cosine_rows,
}
ATTENTION_TERMS = ("attention", "attention_kl", "attention_groups")
VISUAL_TERMS = ("visual", "focus", "normed_visual", "relation")
PUBLISHED_TERMS = ("published_logits", "published_attention", "published_focus")
TERMS = ("cross_entropy", *DIVERGENCES, *ATTENTION_TERMS, *VISUAL_TERMS, *PUBLISHED_TERMS)
# terms that need an adapter: the head map, the map to the student's width, the map to the teacher's
HEAD_MAPPED = ("attention", "published_attention")
TEACHER_MAPPED = ("visual", "focus", "published_focus")
STUDENT_MAPPED = ("normed_visual",)
MAX_LOGITS = 1 << 22  # logits of one model alive at a time: 16 MiB in float32


@dataclass(frozen=True)
class TermSettings:
    """What the terms are computed with.

    Args:
        temperature: of the divergences.
        mask: where the divergences look: "answer", "answer+vision" or "all".
        label_smoothing: of the cross entropy.
        top_k: visual tokens per image of the focus term.
        attention_by_mass: the attention KL weighs rows by the teacher's attention on the image.
    """

    temperature: float = 1.0
    mask: str = "answer"
    label_smoothing: float = 0.0
    top_k: int = 16
    attention_by_mass: bool = False


class AlignKD(nn.Module):
    """The trained module: the student, and the maps between the teacher's heads and width and the student's.

    The teacher is held but not registered: it is in no optimizer, no checkpoint and no mode change.

    Args:
        student: trained in place; its tower stays frozen unless ``freeze_tower`` is False.
        teacher: frozen; None when ``weights`` name cross entropy alone.
        weights: term -> weight; terms that are absent are not computed.
        settings: what the terms are computed with.
        learned_balance: the distillation terms' weights are learned as the terms' uncertainties (Kendall et al. 2018):
            each counts as ``weight * (exp(-s) * term + s)`` with one trained ``s`` a term, which starts at 0.
        seed: of the adapters' initial values.
    """

    def __init__(
        self,
        student: MobileVlm,
        teacher: MobileVlm | None,
        weights: Mapping[str, float],
        settings: TermSettings | None = None,
        freeze_tower: bool = True,
        learned_balance: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert set(weights) <= set(TERMS), weights
        assert teacher is not None or set(weights) <= {"cross_entropy"}
        self.student = student.requires_grad_(True)
        student.vision_tower.requires_grad_(not freeze_tower)
        for parameter in unused_tower_parameters(student):
            parameter.requires_grad_(False)
        self.weights, self.settings = dict(weights), settings or TermSettings()
        self.freeze_tower = freeze_tower
        self._teacher = (teacher.requires_grad_(False).eval(),) if teacher is not None else ()
        self.shares_tower = teacher is not None and freeze_tower and tower_hash(teacher) == tower_hash(student)
        self.head_map: nn.Conv2d | None = None
        self.visual_map: nn.Linear | None = None
        self.student_map: nn.Linear | None = None
        self.balance: nn.ParameterDict | None = None
        if teacher is not None:
            self._make_adapters(teacher, seed)
        if learned_balance:
            taught = [name for name in self.weights if name != "cross_entropy"]
            self.balance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in taught})

    def _make_adapters(self, teacher: MobileVlm, seed: int) -> None:
        theirs, ours = teacher.config.text_config, self.student.config.text_config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._uses(HEAD_MAPPED):
                self.head_map = nn.Conv2d(theirs.num_attention_heads, ours.num_attention_heads, 1)
            if self._uses(TEACHER_MAPPED):
                self.visual_map = nn.Linear(theirs.hidden_size, ours.hidden_size)
            if self._uses(STUDENT_MAPPED):
                self.student_map = nn.Linear(ours.hidden_size, theirs.hidden_size)
        for adapter in (self.head_map, self.visual_map):  # in no optimizer of the published code
            if adapter is not None and self._uses(PUBLISHED_TERMS):
                adapter.requires_grad_(False)

    @property
    def teacher(self) -> MobileVlm | None:
        """The frozen teacher, outside of this module's parameters."""
        return self._teacher[0] if self._teacher else None

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapters' tensors by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("student.")}

    def total(self, terms: Mapping[str, torch.Tensor], taught_share: float = 1.0) -> torch.Tensor:
        """Weighted sum of the terms; ``taught_share`` scales all of them but the cross entropy."""
        parts = []
        for name, value in terms.items():
            if self.balance is not None and name in self.balance:
                value = value * (-self.balance[name]).exp() + self.balance[name]
            share = 1.0 if name == "cross_entropy" else taught_share
            parts.append(share * self.weights[name] * value)
        return torch.stack(parts).sum()

    @torch.no_grad()
    def fit_visual_maps(self, features: torch.Tensor) -> None:
        """Start the maps between visual tokens at the least-squares fit, so that their terms do not begin far off.

        Random maps make terms that dwarf the cross entropy's gradient, and clipping then leaves little of it.

        Args:
            features: [n, P, D_v], of a tower that student and teacher share.
        """
        if self.teacher is None:
            return
        ours, theirs = (
            vlm.projector(features.to(vlm.dtype)).float().flatten(0, 1) for vlm in (self.student, self.teacher)
        )  # [n * N, D]
        for linear, source, target in ((self.visual_map, theirs, ours), (self.student_map, ours, theirs)):
            if linear is not None:
                with_one = torch.cat([source, torch.ones_like(source[:, :1])], 1)
                solution = torch.linalg.lstsq(with_one, target, driver="gelsd").solution  # [D_in + 1, D_out]
                linear.weight.copy_(solution[:-1].T)
                linear.bias.copy_(solution[-1])

    @property
    def wanted(self) -> Wanted:
        """What the terms ask of the teacher."""
        groups = self.student.config.text_config.num_hidden_layers if self._uses(("attention_groups",)) else 0
        return Wanted(
            rows=self.settings.mask if self._uses(tuple(DIVERGENCES)) else None,
            temperature=self.settings.temperature,
            attention=self._uses(("attention", "attention_kl", "focus")),
            groups=groups,
            visual=self._uses(VISUAL_TERMS),
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        teacher_view: TeacherView | None = None,
    ) -> dict[str, torch.Tensor]:
        """One batch -> unweighted terms.

        Args:
            input_ids, attention_mask, labels: [B, T], one image id per image.
            pixel_values: [n, 3, S, S] in reading order; or
            image_features: [n, P, D_v], features of a tower that student and teacher share. A batch without an image id
                may bring one blank image, which adds 0: every trained parameter then takes part in every batch, as
                training on several processes needs.
            teacher_view: of this batch, recorded before; otherwise the teacher runs.
        """
        wanted = self.wanted
        images = int((input_ids == self.student.image_token_id).sum())
        batch = (input_ids, attention_mask, labels)
        features = self._features(self.student, pixel_values, image_features)
        visual = None if features is None else self.student.projector(features.to(self.student.dtype))  # [n, N, D_S]
        student = look(self.student, *batch, visual if images else None, wanted.groups > 0)
        view, seen = teacher_view, None
        if self.teacher is not None and view is None:
            with torch.no_grad():
                known = features if self.shares_tower else self._features(self.teacher, pixel_values, image_features)
                if images and known is not None:
                    known = self.teacher.projector(known.to(self.teacher.dtype))  # [n, N, D_T]
                seen = look(self.teacher, *batch, known if images else None, wanted.groups > 0)
                view = live_view(self.teacher, seen, wanted)
        terms = self._row_terms(student, view)
        if view is not None:
            terms |= self._image_terms(student, view)
        if seen is not None and self._uses(PUBLISHED_TERMS):
            terms |= self._published_terms(student, seen)
        if not images and visual is not None:
            first = next(iter(terms))
            terms[first] = terms[first] + 0.0 * self._touch(visual)
        return terms

    def _uses(self, names: tuple[str, ...]) -> bool:
        return any(name in self.weights for name in names)

    def _features(self, vlm: MobileVlm, pixels: torch.Tensor | None, known: torch.Tensor | None) -> torch.Tensor | None:
        if known is not None or pixels is None:
            return known
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_tower):
            return vlm.tower_features(pixels)  # [n, P, D_v]

    def _touch(self, visual: torch.Tensor) -> torch.Tensor:
        """A scalar that depends on the projector, through ``visual``, and on every adapter."""
        adapters = [parameter.sum() for name, parameter in self.named_parameters() if not name.startswith("student.")]
        return torch.stack([visual.sum(), *adapters]).sum()

    def _row_terms(self, student: Roles, teacher: TeacherView | None) -> dict[str, torch.Tensor]:
        """Cross entropy and divergences, lm_head and both softmaxes run on predicting rows alone, a chunk at a time."""
        rows = None if teacher is None else teacher.rows
        hidden, targets = predicting_rows(student, self.settings.mask if rows is not None else "answer")  # [S, D], [S]
        size = max(1, MAX_LOGITS // self.student.config.text_config.vocab_size)
        split = hidden.split(size)
        theirs = [None] * len(split) if rows is None else rows.split(size)
        chunks = zip(split, theirs, targets.split(size), strict=True)
        if len(targets) <= size:
            parts = [self._chunk_terms(*chunk) for chunk in chunks]
        else:  # recomputed in the backward pass, so that no two chunks' logits are alive together
            parts = [checkpoint(self._chunk_terms, *chunk, use_reentrant=False) for chunk in chunks]
        supervised = (targets != -100).sum().clamp_min(1)
        count = {name: supervised if name == "cross_entropy" else max(1, len(targets)) for name in parts[0]}
        return {name: torch.stack([part[name] for part in parts]).sum() / count[name] for name in parts[0]}

    def _chunk_terms(
        self, hidden: torch.Tensor, theirs: TeacherRows | None, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Sums over a chunk's rows. hidden [c, D], targets [c]."""
        logits = self.student.lm_head(hidden)  # [c, V]
        terms = {}
        if "cross_entropy" in self.weights:
            terms["cross_entropy"] = cross_entropy_rows(logits, targets, self.settings.label_smoothing).sum()
        if theirs is not None:
            temperature = self.settings.temperature
            log_student, log_teacher = theirs.beside(log_probabilities(logits, temperature))  # [c, W]
            for name, divergence in DIVERGENCES.items():
                if name in self.weights:
                    terms[name] = divergence(log_student, log_teacher).sum() * temperature**2
        return terms

    def _image_terms(self, student: Roles, teacher: TeacherView) -> dict[str, torch.Tensor]:
        ours = student.expanded.visual_tokens  # [n, N, D_S]
        if ours is None:
            zero = student.hidden.sum() * 0.0
            return {name: zero for name in ATTENTION_TERMS + VISUAL_TERMS if name in self.weights}
        spans = spans_of(student.expanded)
        terms = self._attention_terms(student, teacher, spans)
        if teacher.visual is not None:
            terms |= self._visual_terms(ours, teacher.visual, teacher.attention, spans)
        return terms

    def _attention_terms(self, student: Roles, teacher: TeacherView, spans: Spans) -> dict[str, torch.Tensor]:
        terms, mask, by_mass = {}, spans.row_mask, self.settings.attention_by_mass
        if teacher.attention is not None and self._uses(("attention", "attention_kl")):
            block = text_to_image_attention(self.student, student, spans)  # [n, H_S, R, N]
            if "attention" in self.weights:
                assert self.head_map is not None
                terms["attention"] = attention_mse(block, self.head_map(teacher.attention), mask)
            if "attention_kl" in self.weights:
                terms["attention_kl"] = attention_kl(block, teacher.attention, mask, by_mass)
        if teacher.group_attention is not None:
            layers = [
                attention_kl(text_to_image_attention(self.student, student, spans, layer), group, mask, by_mass)
                for layer, group in enumerate(teacher.group_attention)
            ]
            terms["attention_groups"] = torch.stack(layers).mean()
        return terms

    def _visual_terms(
        self, ours: torch.Tensor, theirs: torch.Tensor, their_block: torch.Tensor | None, spans: Spans
    ) -> dict[str, torch.Tensor]:
        """ours [n, N, D_S], theirs [n, N, D_T], their_block [n, H_T, R, N]."""
        terms = {}
        if self.visual_map is not None:
            mapped = self.visual_map(theirs)  # [n, N, D_S]
            if "visual" in self.weights:
                terms["visual"] = visual_mse(ours, mapped)
            if "focus" in self.weights:
                assert their_block is not None
                terms["focus"] = focus_mse(ours, mapped, their_block, spans.row_mask, self.settings.top_k)
        if self.student_map is not None:
            terms["normed_visual"] = normed_visual_mse(self.student_map(ours), theirs)
        if "relation" in self.weights:
            terms["relation"] = relation_distance(ours, theirs)
        return terms

    def _published_terms(self, student: Roles, teacher: Roles) -> dict[str, torch.Tensor]:
        """The terms of the published code; as there, a batch with a row without an image has none of them."""
        vlm, ours, theirs = self.teacher, student.expanded.visual_tokens, teacher.expanded.visual_tokens
        assert vlm is not None
        terms = {}
        every_row_has_one = ours is not None and len(ours) == len(student.hidden)
        if not every_row_has_one or ours is None or theirs is None:
            return {name: student.hidden.sum() * 0.0 for name in PUBLISHED_TERMS if name in self.weights}
        if "published_logits" in self.weights:
            terms["published_logits"] = published_logits(
                self.student.lm_head(student.hidden), vlm.lm_head(teacher.hidden)
            )
        if "published_attention" in self.weights:
            assert self.head_map is not None
            terms["published_attention"] = published_attention(self.head_map)
        if "published_focus" in self.weights:
            assert self.visual_map is not None
            mapped = self.visual_map(theirs)  # [n, N, D_S]
            terms["published_focus"] = published_focus(ours, mapped, vlm, teacher, self.settings.top_k)
        return terms
