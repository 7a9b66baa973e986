"""Training settings + the ledger of a teacher cache -> what a run asks of a teacher, and which recordings may do."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from bundle.errors import UsageError
from distill.settings.recording import CacheConfig
from distill.settings.training import DistillConfig
from distill.teacher_cache.identity import Identity, TeacherFacts, checkpoint_sha256
from distill.teacher_cache.parts import Asked, PartLedger


def asked_by(config: DistillConfig | CacheConfig, student_layers: int) -> Asked:
    """What a run, or the recording for it, computes with the teacher.

    Raises:
        UsageError: a term needs a running teacher.
    """
    terms = tuple(config.term_weights)
    groups = student_layers if "attention_groups" in terms else 0
    return Asked(terms, config.mask, config.divergence_temperature, config.top_k, groups)


@dataclass(frozen=True)
class Question:
    """What a run asks, beside its settings, which messages name."""

    config: DistillConfig
    asked: Asked

    def teacher_of(self, ledger: PartLedger) -> TeacherFacts:
        """The recorded teacher that is the one at --teacher, or the only one when that is not on this disk."""
        cache, folder, known = self.config.cache, self.config.teacher, ledger.teachers()
        if not known:
            raise UsageError(f"{cache} is no teacher cache; make it: {recording_command(self.config)}")
        if folder is None or not (folder / "config.json").is_file():
            if len(known) == 1:
                return known[0]
            away = "" if folder is None else f"; {folder} is not on this disk"
            raise UsageError(f"{cache} holds {len(known)} teachers; give the one to learn from by --teacher DIR{away}")
        sha256 = checkpoint_sha256(folder)
        for facts in known:
            if facts.sha256 == sha256:
                return facts
        recorded = ", ".join(facts.sha256[:12] for facts in known)
        raise UsageError(
            f"{cache} was recorded with another teacher ({recorded}; {folder} is {sha256[:12]}); "
            f"record this one: {recording_command(self.config)}"
        )

    def recorded(self, ledger: PartLedger, part: str, demand: Identity) -> list[Identity]:
        """What was recorded of a part as demanded, fullest first."""
        form = "heads" if part == "attention" and "attention" in self.asked.terms else None
        found = ledger.matching(demand, form)
        if found:
            return found
        why = ledger.differences(demand)
        if ledger.matching(demand):
            why = "recorded was its mean over heads, and the term attention needs every head"
        terms = ", ".join(self.asked.needed()[part])
        raise UsageError(
            f"{self.config.cache} holds no {part} as {terms} needs it: {why}; record it: "
            f"{recording_command(self.config)}"
        )


def recorded_teacher(config: DistillConfig, student_layers: int) -> TeacherFacts:
    """The teacher whose recording a run with --cache would read.

    Raises:
        UsageError: no cache there, or it is of another teacher.
    """
    assert config.cache is not None
    return Question(config, asked_by(config, student_layers)).teacher_of(PartLedger(config.cache))


def recording_command(config: DistillConfig) -> str:
    """The command that records what this run needs."""
    default = {field.name: field.default for field in fields(DistillConfig)}
    words = [
        "alignkd-distill",
        "cache",
        "--teacher",
        str(config.teacher or "TEACHER"),
        "--student",
        str(config.student),
    ]
    words += ["--data", str(config.data), "--images", str(config.image_folder), "--cache", str(config.cache)]
    for name in ("losses", "temperature", "mask", "top_k", "template", "image_strategy", "on_bad_image"):
        value = vars(config)[name]
        if value != default[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for field in fields(config.weights):
        weight = vars(config.weights)[field.name]
        if weight is not None:
            words += [f"--weights.{field.name.replace('_', '-')}", str(weight)]
    return shlex.join(words)
