"""Student, teacher, term weights -> AlignKD: one batch in, {term: loss} out; the adapters are part of the module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distill.align_kd.image_terms import Adapters, image_terms
from distill.align_kd.published_code import published_terms
from distill.align_kd.row_terms import row_terms
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import Roles, look, predicting_rows, tower_hash, unused_tower_parameters
from distill.settings.terms import (
    DIVERGENCE_TERMS,
    PUBLISHED_TERMS,
    TERMS,
    VISUAL_TERMS,
    WORDY_TERMS,
    TermSettings,
)
from distill.teacher.bridge import on_students_grid
from distill.teacher.recorded_view import recorded_view
from distill.teacher.view import TeacherRows, TeacherShape, TeacherView, Wanted, live_view

# terms that need an adapter: the head map, the map to the student's width, the map to the teacher's
HEAD_MAPPED = ("attention", "published_attention")
TEACHER_MAPPED = ("visual", "focus", "published_focus")
STUDENT_MAPPED = ("normed_visual",)


class AlignKD(nn.Module):
    """The trained module: the student, and the maps between the teacher's heads and width and the student's.

    The teacher is held but not registered: it is in no optimizer, no checkpoint and no mode change.

    Args:
        student: trained in place; its tower stays frozen unless ``freeze_tower`` is False.
        teacher: frozen; None when ``weights`` name cross entropy alone, or when batches bring what it said, recorded.
        weights: term -> weight; terms that are absent are not computed.
        settings: what the terms are computed with.
        learned_balance: the distillation terms' weights are learned as the terms' uncertainties (Kendall et al. 2018):
            each counts as ``weight * (exp(-s) * term + s)`` with one trained ``s`` a term, which starts at 0.
        seed: of the adapters' initial values.
        same_pictures: student and teacher preprocess images alike, so that one run of a shared tower serves both.
        recorded_teacher: sizes of the teacher whose recording the batches bring.
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
        same_pictures: bool = True,
        recorded_teacher: TeacherShape | None = None,
    ) -> None:
        super().__init__()
        assert set(weights) <= set(TERMS), weights
        assert teacher is not None or recorded_teacher is not None or set(weights) <= {"cross_entropy"}
        self.student = student.requires_grad_(True)
        student.vision_tower.requires_grad_(not freeze_tower)
        for parameter in unused_tower_parameters(student):
            parameter.requires_grad_(False)
        self.weights, self.settings = dict(weights), settings or TermSettings()
        self.taught_share = 1.0  # what ``total`` is going to be called with; a wrong guess costs time, nothing else
        if student.config.text_config.tie_word_embeddings:  # safetensors keeps no tensor twice
            self.register_state_dict_post_hook(_without_tied_head)
        self.freeze_tower = freeze_tower
        self._teacher = (teacher.requires_grad_(False).eval(),) if teacher is not None else ()
        on_paper = student.device.type == "meta"  # a plan of a run, without weights to compare
        self.shares_tower = False
        if teacher is not None and freeze_tower and same_pictures:
            self.shares_tower = on_paper or tower_hash(teacher) == tower_hash(student, teacher.dtype)
        self.head_map: nn.Conv2d | None = None
        self.visual_map: nn.Linear | None = None
        self.student_map: nn.Linear | None = None
        self.balance: nn.ParameterDict | None = None
        if teacher is not None:
            text = teacher.config.text_config
            recorded_teacher = TeacherShape(text.num_attention_heads, text.hidden_size)
        if recorded_teacher is not None:
            self._make_adapters(recorded_teacher, seed)
        if learned_balance:
            taught = [name for name in self.weights if name != "cross_entropy"]
            self.balance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in taught})

    def _make_adapters(self, theirs: TeacherShape, seed: int) -> None:
        ours = self.student.config.text_config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._uses(HEAD_MAPPED):
                self.head_map = nn.Conv2d(theirs.heads, ours.num_attention_heads, 1)
            if self._uses(TEACHER_MAPPED):
                self.visual_map = nn.Linear(theirs.width, ours.hidden_size)
            if self._uses(STUDENT_MAPPED):
                self.student_map = nn.Linear(ours.hidden_size, theirs.width)
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

    def total(self, terms: Mapping[str, torch.Tensor], taught_share: float = 1.0, parts: int = 1) -> torch.Tensor:
        """Weighted sum of the terms; ``taught_share`` scales all of them but the cross entropy.

        ``parts``: how many such sums add up to one step, when ``terms`` are a micro batch's shares of its terms.
        """
        weighted = []
        for name, value in terms.items():
            if self.balance is not None and name in self.balance:
                value = value * (-self.balance[name]).exp() + self.balance[name] / parts
            share = 1.0 if name == "cross_entropy" else taught_share
            weighted.append(share * self.weights[name] * value)
        return torch.stack(weighted).sum()

    @property
    def wanted(self) -> Wanted:
        """What the terms ask of the teacher."""
        groups = self.student.config.text_config.num_hidden_layers if self._uses(("attention_groups",)) else 0
        return Wanted(
            rows=self.settings.mask if self._uses(DIVERGENCE_TERMS) else None,
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
        teacher_pixel_values: torch.Tensor | None = None,
        recorded: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """One batch -> unweighted terms.

        Args:
            input_ids, attention_mask, labels: [B, T], one image id per image.
            pixel_values: [n, 3, S, S] in reading order; or
            image_features: [n, P, D_v], features of a tower that student and teacher share. A batch without an image id
                may bring one blank image, which adds 0: every trained parameter then takes part in every batch, as
                training on several processes needs.
            teacher_pixel_values: [n, 3, S_T, S_T], the same pictures, where the teacher wants them differently.
            recorded: what a teacher said to this batch (``distill.teacher.recorded_view``), for a module without one.
        """
        wanted = self.wanted
        images = int((input_ids == self.student.image_token_id).sum())
        batch = (input_ids, attention_mask, labels)
        features = self._features(self.student, pixel_values, image_features)
        visual = None if features is None else self.student.projector(features.to(self.student.dtype))  # [n, N, D_S]
        published = self._uses(PUBLISHED_TERMS)  # they look at every position
        mask = "all" if published else wanted.rows or "answer"
        student = look(self.student, *batch, visual if images else None, wanted.groups > 0, mask)
        view, seen = None if recorded is None else recorded_view(recorded), None
        if self.teacher is not None:
            with torch.no_grad():
                known = None
                if images:
                    pixels = pixel_values if teacher_pixel_values is None else teacher_pixel_values
                    known = self._teacher_tokens(features, pixels, image_features)  # [n, N, D_T]
                if self._uses(WORDY_TERMS):
                    theirs = torch.where(
                        input_ids == self.student.image_token_id, self.teacher.image_token_id, input_ids
                    )
                    mask = "all" if published or wanted.groups else wanted.rows or "none"
                    seen = look(self.teacher, theirs, attention_mask, labels, known, wanted.groups > 0, mask)
                    view = live_view(self.teacher, seen, wanted)
                else:
                    view = TeacherView(visual=known)
        terms = self.compare(student, view)
        if seen is not None and published:
            assert self.teacher is not None
            terms |= published_terms(
                self.weights,
                (self.student, self.teacher),
                (student, seen),
                self.head_map,
                self.visual_map,
                self.settings.top_k,
            )
        if not images and visual is not None:
            first = next(iter(terms))
            terms[first] = terms[first] + 0.0 * self._touch(visual)
        return terms

    def compare(self, student: Roles, teacher: TeacherView | None) -> dict[str, torch.Tensor]:
        """The student's look at a batch and what the teacher said to it, now or before -> unweighted terms."""
        terms = self._row_terms(student, None if teacher is None else teacher.rows)
        if teacher is None:
            return terms
        adapters = Adapters(self.head_map, self.visual_map, self.student_map)
        return terms | image_terms(self.weights, self.student, student, teacher, adapters, self.settings)

    def _row_terms(self, student: Roles, rows: TeacherRows | None) -> dict[str, torch.Tensor]:
        taught = () if rows is None else DIVERGENCE_TERMS
        names = [name for name in self.weights if name == "cross_entropy" or name in taught]
        if not names:
            return {}
        hidden, targets = predicting_rows(student, "answer" if rows is None else self.settings.mask)  # [S, D], [S]
        foretold = self._foretold(names, hidden.device)
        words = self.student.config.text_config.vocab_size
        return row_terms(names, self.student.lm_head, hidden, targets, rows, self.settings, foretold, words)

    def _uses(self, names: tuple[str, ...]) -> bool:
        return any(name in self.weights for name in names)

    def _features(self, vlm: MobileVlm, pixels: torch.Tensor | None, known: torch.Tensor | None) -> torch.Tensor | None:
        if known is not None or pixels is None:
            return known
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_tower):
            return vlm.tower_features(pixels)  # [n, P, D_v]

    @torch.no_grad()
    def _teacher_tokens(
        self, student: torch.Tensor | None, pixels: torch.Tensor | None, known: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The teacher's visual tokens [n, N, D_T] from the student's features, or from pixels or known features."""
        assert self.teacher is not None
        seen = student if self.shares_tower else self._features(self.teacher, pixels, known)
        return None if seen is None else self.teacher.projector(seen.to(self.teacher.dtype))

    @torch.no_grad()
    def visual_pair(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        teacher_pixel_values: torch.Tensor | None = None,
        recorded: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Visual tokens of a batch's images: the student's [n, N, D_S] and the teacher's on its grid [n, N, D_T].

        The arguments are those of ``forward``. None without images or without the teacher's tokens.
        """
        features = self._features(self.student, pixel_values, image_features)
        if features is None:
            return None
        ours = self.student.projector(features.to(self.student.dtype))  # [n, N, D_S]
        if recorded is not None:
            view = recorded_view(recorded)
        elif self.teacher is not None:
            pixels = pixel_values if teacher_pixel_values is None else teacher_pixel_values
            view = TeacherView(visual=self._teacher_tokens(features, pixels, image_features))
        else:
            return None
        theirs = on_students_grid(view, ours.shape[1]).visual
        return None if theirs is None else (ours, theirs)

    def _touch(self, visual: torch.Tensor) -> torch.Tensor:
        """A scalar that depends on the projector, through ``visual``, and on every adapter."""
        adapters = [parameter.sum() for name, parameter in self.named_parameters() if not name.startswith("student.")]
        return torch.stack([visual.sum(), *adapters]).sum()

    def _foretold(self, names: list[str], device: torch.device) -> torch.Tensor:
        """The weight [K] that ``total`` gives each term."""
        weights = [self.weights[name] * (1.0 if name == "cross_entropy" else self.taught_share) for name in names]
        foretold = torch.tensor(weights, device=device)
        if self.balance is None:
            return foretold
        balance = self.balance
        learned = [balance[name].detach() if name in balance else foretold.new_zeros(()) for name in names]
        return foretold * (-torch.stack(learned)).exp()


def _without_tied_head(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
    state.pop(f"{prefix}student.lm_head.weight", None)
