"""DistillConfig + student + teacher -> AlignKD as the settings train it: the one place that makes it."""

from __future__ import annotations

from distill.align_kd.module import AlignKD
from distill.models.mobilevlm import MobileVlm
from distill.settings.terms import TermSettings
from distill.settings.training import DistillConfig
from distill.teacher.view import TeacherShape
from distill.training.lora import add_lora


def make_module(
    config: DistillConfig,
    student: MobileVlm,
    teacher: MobileVlm | None,
    same_pictures: bool = True,
    recorded: TeacherShape | None = None,
) -> AlignKD:
    """The module that the settings train, low-rank updates included."""
    module = AlignKD(
        student,
        teacher,
        config.term_weights,
        _term_settings(config),
        config.freeze_tower,
        config.learned_balance,
        config.seed,
        same_pictures,
        recorded,
    )
    if config.lora.rank:
        add_lora(student, config.lora)
    return module


def _term_settings(config: DistillConfig) -> TermSettings:
    """The part of the settings that the loss terms are computed with."""
    return TermSettings(
        temperature=config.divergence_temperature,
        mask=config.mask,
        label_smoothing=config.label_smoothing,
        top_k=config.top_k,
        attention_by_mass=config.attention_by_mass,
    )
