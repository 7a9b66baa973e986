"""Training settings + teacher cache -> TeacherCache that answers for every conversation, or a line saying why not."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bundle.errors import UsageError
from distill.batches.dataset import Example
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.conversation import Row
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.models.roles import tower_hash
from distill.settings.recording import CacheConfig
from distill.settings.training import DistillConfig
from distill.teacher_cache.cache import DIGESTS, SHARDS, TeacherCache, contents_of
from distill.teacher_cache.identity import (
    Identity,
    TeacherFacts,
    checkpoint_sha256,
    entry_key,
    identity_hash,
    processing_identity,
)
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.parts import Asked, PartLedger, demands, features_demand
from distill.teacher_cache.shards import ShardReader


def asked_by(config: DistillConfig | CacheConfig, student_layers: int) -> Asked:
    """What a run, or the recording for it, computes with the teacher.

    Raises:
        UsageError: a term needs a running teacher.
    """
    terms = tuple(config.term_weights)
    groups = student_layers if "attention_groups" in terms else 0
    return Asked(terms, config.mask, config.divergence_temperature, config.top_k, groups)


@dataclass(frozen=True)
class Lacking:
    """What recordings lack of some conversations.

    Attributes:
        missing: (part, identity) -> conversations without an entry, for each recording that may serve.
        total: conversations looked at.
    """

    missing: Mapping[tuple[str, str], int]
    total: int

    def __add__(self, other: Lacking) -> Lacking:
        """Of both, when they looked for the same recordings."""
        both = {one: number + other.missing[one] for one, number in self.missing.items()}
        return Lacking(both, self.total + other.total)


class CacheSearch:
    """The recordings in a cache that are of the right teacher, template, mask and temperature.

    ``lacking`` of all conversations, in one process or added up over several that share them, decides what is read.

    Raises:
        UsageError: no cache there, it is of another teacher, template, mask or temperature, or lacks what a term needs;
            the line names the command that completes it.
    """

    def __init__(self, config: DistillConfig, student: MobileVlm, processing: Processing) -> None:
        assert config.cache is not None
        self._config, self._feature_shape = config, student.config.feature_shape
        question = _Question(config, asked_by(config, student.config.text_config.num_hidden_layers or 0))
        ledger = PartLedger(config.cache)
        self.teacher = question.teacher_of(ledger)
        _check_pair(self.teacher, student, config.student)
        identity = processing_identity(processing)
        self._candidates = {
            part: [identity_hash(one) for one in question.recorded(ledger, part, demand)]
            for part, demand in demands(question.asked, self.teacher.sha256, identity).items()
        }
        if config.freeze_tower:
            demand = features_demand(tower_hash(student), identity)
            self._candidates["features"] = [identity_hash(one) for one in ledger.matching(demand)]
        self._reader = ShardReader(config.cache / SHARDS)
        self._digests = ImageDigests(config.cache / DIGESTS)
        self._left_out = _cannot_be_read(ImageStore(processing.image, 0)) if config.on_bad_image == "skip" else _no_row

    def lacking(self, examples: Iterable[Example]) -> Lacking:
        """Look every conversation up.

        Raises:
            UsageError: an image cannot be read, of a row that training does not leave out.
        """
        return count_missing(self._reader, self._digests, self._candidates, examples, self._left_out)

    def chosen(self, lacking: Lacking) -> TeacherCache:
        """The recording that training reads instead of running a teacher; of several that are whole, the fullest.

        Raises:
            UsageError: none has every conversation; the line names the command that completes it.
        """
        parts, short = {}, {}
        for part, identities in self._candidates.items():
            if identities:
                best = min(identities, key=lambda one, part=part: lacking.missing[part, one])  # type: ignore[misc]
                if lacking.missing[part, best] and part != "features":  # the tower itself can still look
                    short[part] = lacking.missing[part, best]
                elif not lacking.missing[part, best]:
                    parts[part] = best
        if short:
            listed = ", ".join(f"{part} of {number}" for part, number in short.items())
            raise UsageError(
                f"{self._config.cache} lacks {listed} of {lacking.total} conversations; "
                f"complete it: {recording_command(self._config)}"
            )
        return TeacherCache(self._reader, self._digests, self.teacher, parts, self._feature_shape)


def recorded_teacher(config: DistillConfig, student_layers: int) -> TeacherFacts:
    """The teacher whose recording a run with --cache would read.

    Raises:
        UsageError: no cache there, or it is of another teacher.
    """
    assert config.cache is not None
    return _Question(config, asked_by(config, student_layers)).teacher_of(PartLedger(config.cache))


def count_missing(
    reader: ShardReader,
    digests: ImageDigests,
    candidates: Mapping[str, Sequence[str]],
    examples: Iterable[Example],
    left_out: Callable[[Row], bool],
) -> Lacking:
    """Conversations without an entry, for each candidate.

    Args:
        left_out: whether training leaves a row without an entry out of its batches; such a row lacks nothing.

    Raises:
        UsageError: an image cannot be read, of a row that is not left out.
    """
    missing = {(part, identity): 0 for part, identities in candidates.items() for identity in identities}
    total = 0
    for example in examples:
        total += 1
        try:
            contents = contents_of(example, digests)
        except UsageError as error:
            if left_out(example["row"]):
                continue
            raise UsageError(f"row {example['row'].number}: {error}") from error
        lacking = []
        for part, identity in missing:
            content = contents.of(part)
            if content is not None and reader.find(entry_key(identity, content)) is None:
                lacking.append((part, identity))
        if lacking and not left_out(example["row"]):
            for one in lacking:
                missing[one] += 1
    return Lacking(missing, total)


def _no_row(row: Row) -> bool:
    return False


def _cannot_be_read(images: ImageStore) -> Callable[[Row], bool]:
    def left_out(row: Row) -> bool:
        if row.image is None:
            return False
        try:
            images.decode(row)
        except BadImageError:
            return True
        return False

    return left_out


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


@dataclass(frozen=True)
class _Question:
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


def _check_pair(facts: TeacherFacts, student: MobileVlm, folder: Path) -> None:
    """A recording keeps words and visual tokens by their numbers; pictures and tokenizer are of its identities."""
    theirs = (facts.vocabulary, facts.visual_tokens)
    ours = (student.config.text_config.vocab_size, student.config.visual_tokens)
    if theirs != ours:
        raise UsageError(
            f"student {folder} and the cached teacher do not fit: vocabulary and visual tokens are {ours[0]}, "
            f"{ours[1]} and {theirs[0]}, {theirs[1]}; choose a pair that agrees, or train without --cache"
        )
