"""Teacher cache + the conversations of a run -> TeacherCache that answers for all of them, or a line saying why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import UsageError
from distill.batches.dataset import Example
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.conversation import Row
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.models.roles import tower_hash
from distill.settings.training import DistillConfig
from distill.teacher_cache.cache import DIGESTS, SHARDS, TeacherCache, contents_of
from distill.teacher_cache.identity import (
    TeacherFacts,
    entry_key,
    identity_hash,
    processing_identity,
)
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.parts import PartLedger, demands, features_demand
from distill.teacher_cache.question import Question, asked_by, recording_command
from distill.teacher_cache.shards import ShardReader


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
        question = Question(config, asked_by(config, student.config.text_config.num_hidden_layers or 0))
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


def _check_pair(facts: TeacherFacts, student: MobileVlm, folder: Path) -> None:
    """A recording keeps words and visual tokens by their numbers; pictures and tokenizer are of its identities."""
    theirs = (facts.vocabulary, facts.visual_tokens)
    ours = (student.config.text_config.vocab_size, student.config.visual_tokens)
    if theirs != ours:
        raise UsageError(
            f"student {folder} and the cached teacher do not fit: vocabulary and visual tokens are {ours[0]}, "
            f"{ours[1]} and {theirs[0]}, {theirs[1]}; choose a pair that agrees, or train without --cache"
        )
