"""A recording's data + what its cache holds -> the conversations with something missing, and how many bytes that is."""

from __future__ import annotations

import shutil
from array import array
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress

from bundle.errors import AlignKDError, UsageError
from distill.batches.dataset import Example
from distill.batches.image_store import BadImageError
from distill.settings.recording import CacheConfig
from distill.teacher_cache.cache import Contents, contents_of
from distill.teacher_cache.entries import entry_bytes
from distill.teacher_cache.identity import entry_key, identity_hash
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.parts import OF_SAMPLES
from distill.teacher_cache.shards import ShardReader
from distill.teacher_cache.source import RecordingSource

FREE_SHARE = 0.95  # of the free disk that a recording may fill


@dataclass
class ToRecord:
    """Conversations with something missing, as numbers into the data set, and bytes."""

    total: int = 0
    left_out: int = 0
    numbers: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    missing_bytes: int = 0
    whole_bytes: int = 0


class Missing:
    """Which entries of a conversation no one has recorded yet."""

    def __init__(self, source: RecordingSource, reader: ShardReader, digests: ImageDigests) -> None:
        self._hashes = {part: identity_hash(identity) for part, identity in source.identities.items()}
        self._reader, self._digests = reader, digests

    def contents(self, example: Example) -> Contents:
        """The conversation by what it holds."""
        return contents_of(example, self._digests)

    def of(self, contents: Contents, done: set[bytes]) -> dict[str, bytes]:
        """Part -> key of what is missing and not in ``done``."""
        keys = {}
        for part, identity in self._hashes.items():
            content = contents.of(part)
            if content is not None:
                key = entry_key(identity, content)
                if key not in done and self._reader.find(key) is None:
                    keys[part] = key
        return keys


def what_is_missing(config: CacheConfig, source: RecordingSource, missing: Missing, progress: Progress) -> ToRecord:
    """Look at every conversation of this process.

    Raises:
        BadImageError: an image cannot be read, unless such rows are left out.
    """
    plan, done, images = ToRecord(), set[bytes](), set[bytes]()
    task = progress.add_task("looking what is missing", total=len(source.dataset))
    for number in range(len(source.dataset)):
        progress.update(task, completed=number)
        example = source.dataset[number]
        try:
            contents = missing.contents(example)
        except UsageError as error:
            leave_out(config, example, error, progress)
            plan.left_out += config.rank == 0
            continue
        if int.from_bytes((contents.image or contents.sample)[:4], "big") % config.ranks != config.rank:
            continue  # by content: all conversations on an image fall to one process
        sizes = {
            part: entry_bytes(
                part,
                identity,
                source.teacher.config,
                example["input_ids"],
                example["labels"],
                source.processing.tokenizer.image_token_id,
            )
            for part, identity in source.identities.items()
        }
        again = contents.image is not None and contents.image in images
        plan.total += 1
        plan.whole_bytes += sum(size for part, size in sizes.items() if part in OF_SAMPLES or not again)
        if contents.image is not None:
            images.add(contents.image)
        if keys := missing.of(contents, done):
            done.update(keys.values())
            plan.numbers.append(number)
            plan.lengths.append(len(example["input_ids"]))
            plan.missing_bytes += sum(sizes[part] for part in keys)
    return plan


def check_disk(config: CacheConfig, plan: ToRecord, console: Console) -> None:
    """Say how much is to be recorded.

    Raises:
        UsageError: the disk is too small for it.
    """
    free = int(shutil.disk_usage(config.cache).free * FREE_SHARE)
    each = plan.whole_bytes / max(1, plan.total)
    console.print(
        f"{plan.total} conversations, {each / 1e3:.1f} KB each; {len(plan.numbers)} to record: "
        f"{plan.missing_bytes / 1e6:.1f} MB of {free / 1e6:.0f} MB free",
        soft_wrap=True,
    )
    if plan.missing_bytes > free:
        raise UsageError(
            f"{config.cache} needs {plan.missing_bytes / 1e6:.1f} MB more, its disk has {free / 1e6:.1f} MB left; "
            "store less (--words, --columns) or choose another --cache"
        )


def leave_out(config: CacheConfig, example: Example, error: AlignKDError, progress: Progress) -> None:
    """Say that a row is left out, or raise what its image got wrong."""
    row = example["row"].number
    line = str(error) if isinstance(error, BadImageError) else f"row {row}: {error}"
    if config.on_bad_image == "stop":
        raise BadImageError(f"{line}; mend it and record again, or leave such rows out: --on-bad-image skip")
    progress.console.print(f"left out: {line}", soft_wrap=True)
