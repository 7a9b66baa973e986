"""CacheConfig -> teacher cache: what the teacher says to every conversation that the cache does not hold yet."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.batches.collator import BAD_ROWS, Collator
from distill.batches.image_store import BadImageError, ImageStore
from distill.settings.recording import CacheConfig
from distill.teacher_cache.cache import DIGESTS, SHARDS
from distill.teacher_cache.entries import Recorder
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.missing import Missing, ToRecord, check_disk, leave_out, what_is_missing
from distill.teacher_cache.parts import PartLedger
from distill.teacher_cache.shards import ShardReader, ShardWriter, drop_cut_off, drop_faulty
from distill.teacher_cache.source import RecordingSource

SECONDS_BETWEEN_LINES = 30.0  # where stderr is no terminal


@dataclass(frozen=True)
class Recorded:
    """What a recording did.

    Attributes:
        conversations: of this process.
        recorded: of them, those with something missing.
        left_out: of them, those whose image cannot be read.
        shard_bytes: written now.
        estimated_bytes: said beforehand.
        whole_bytes: of all conversations, by the estimate.
    """

    conversations: int
    recorded: int
    left_out: int
    shard_bytes: int
    estimated_bytes: int
    whole_bytes: int


def record(config: CacheConfig, console: Console | None = None) -> Recorded:
    """Complete the cache that ``config`` describes; what stands there is kept.

    Raises:
        UsageError: teacher, student or data is not usable, or the disk is too small; nothing is recorded then.
        BadImageError: an image cannot be read, unless such rows are left out; what was recorded before is kept.
    """
    console = console or Console(stderr=True)
    source = RecordingSource.open(config)
    shards = config.cache / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    if config.ranks == 1:
        drop_cut_off(shards)
    for fault in drop_faulty(shards) if config.mend else []:
        console.print(f"removed: {fault}", soft_wrap=True)
    PartLedger(config.cache).enter(source.facts, source.identities.values())
    work = Missing(source, ShardReader(shards), ImageDigests(config.cache / DIGESTS))
    with _progress(console) as progress:
        plan = what_is_missing(config, source, work, progress)
    check_disk(config, plan, console)
    writer = ShardWriter(shards, config.shard_mb << 20, f"{config.rank}-of-{config.ranks}")
    with _progress(console) as progress:
        corrupt = _run(config, source, work, plan, writer, progress)
    return Recorded(
        conversations=plan.total,
        recorded=len(plan.numbers) - corrupt,
        left_out=plan.left_out + corrupt,
        shard_bytes=writer.written_bytes,
        estimated_bytes=plan.missing_bytes,
        whole_bytes=plan.whole_bytes,
    )


def _run(
    config: CacheConfig,
    source: RecordingSource,
    missing: Missing,
    plan: ToRecord,
    writer: ShardWriter,
    progress: Progress,
) -> int:
    """Record; returns how many rows had to be left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(source.teacher, device)
    image_id, pad_id = source.processing.tokenizer.image_token_id, source.processing.tokenizer.pad_id
    recorder = Recorder(source.teacher, source.asked, source.identities, image_id)
    collator = Collator(pad_id, ImageStore(source.processing.image, 0), report_bad=True)
    done: set[bytes] = set()
    left_out = 0
    task = progress.add_task("recording", total=len(plan.numbers))
    shown = time.monotonic()
    for numbers in _batches(plan, config.batch_size):
        batch = collator([source.dataset[number] for number in numbers])
        bad = set(batch.pop(BAD_ROWS, torch.empty(0)).tolist())
        for number in bad:
            try:
                collator.images.decode(source.dataset.rows[number])
            except BadImageError as error:
                if config.on_bad_image == "stop":
                    writer.flush()
                leave_out(config, source.dataset[number], error, progress)
        left_out += len(bad)
        examples = [source.dataset[number] for number in numbers if number not in bad]
        if not examples:
            continue
        contents = [missing.contents(example) for example in examples]
        keys = []
        for one in contents:
            keys.append(missing.of(one, done))
            done.update(keys[-1].values())
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        parts = {part for found in keys for part in found}
        entries = recorder.entries(batch, parts, [int.from_bytes(one.sample[:7], "big") for one in contents])
        with_image = [i for i, one in enumerate(contents) if one.image is not None]
        for part, recorded in entries.items():
            for i, entry in zip(range(len(examples)) if part == "rows" else with_image, recorded, strict=True):
                if part in keys[i]:
                    writer.add(part, keys[i][part], entry)
        progress.update(task, advance=len(numbers))
        if not progress.console.is_terminal and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            left = progress.tasks[0].time_remaining
            eta = "" if left is None else f", {left:.0f} s left"
            progress.console.print(f"recorded {progress.tasks[0].completed:.0f} of {len(plan.numbers)}{eta}")
    writer.flush()
    return left_out


def _batches(plan: ToRecord, size: int) -> list[list[int]]:
    """Conversations of like length together; batches in an order that keeps the time left honest."""
    order = torch.tensor(plan.lengths).argsort(stable=True)
    batches = torch.tensor(plan.numbers)[order].split(size) if plan.numbers else ()
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [batches[i].tolist() for i in shuffled]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
