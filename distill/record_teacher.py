"""CacheConfig -> teacher cache: what the teacher says to every conversation that the cache does not hold yet."""

from __future__ import annotations

import shutil
import time
from array import array
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bundle.errors import AlignKDError, UsageError
from bundle.staging import sha256_of
from bundle.tokenizer import open_tokenizer
from distill.cache_choice import asked_by
from distill.cache_parts import OF_SAMPLES, Asked, PartLedger, demands, features_demand, stored_as
from distill.cache_shards import ShardReader, ShardWriter, drop_cut_off, drop_faulty
from distill.config import CacheConfig
from distill.data import BAD_ROWS, Collator, Example, LlavaDataset
from distill.image_digests import ImageDigests
from distill.image_store import BadImageError, ImageStore
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.recorded_entries import Recorder, entry_bytes
from distill.rows import open_rows
from distill.teacher import chosen_processing
from distill.teacher_cache import DIGESTS, SHARDS, Contents, contents_of
from distill.teacher_identity import Identity, TeacherFacts, entry_key, facts_of, identity_hash, processing_identity

FREE_SHARE = 0.95  # of the free disk that a recording may fill
SECONDS_BETWEEN_LINES = 30.0  # where stderr is no terminal
ROW_INDEX = "rows"  # of the cache folder: where the data's rows lie


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


@dataclass
class _Plan:
    """Conversations with something missing, as numbers into the data set, and bytes."""

    total: int = 0
    left_out: int = 0
    numbers: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    missing_bytes: int = 0
    whole_bytes: int = 0


def record(config: CacheConfig, console: Console | None = None) -> Recorded:
    """Complete the cache that ``config`` describes; what stands there is kept.

    Raises:
        UsageError: teacher, student or data is not usable, or the disk is too small; nothing is recorded then.
        BadImageError: an image cannot be read, unless such rows are left out; what was recorded before is kept.
    """
    console = console or Console(stderr=True)
    source = _Source.open(config)
    shards = config.cache / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    if config.ranks == 1:
        drop_cut_off(shards)
    for fault in drop_faulty(shards) if config.mend else []:
        console.print(f"removed: {fault}", soft_wrap=True)
    PartLedger(config.cache).enter(source.facts, source.identities.values())
    work = _Missing(source, ShardReader(shards), ImageDigests(config.cache / DIGESTS))
    with _progress(console) as progress:
        plan = _plan(config, source, work, progress)
    _check_disk(config, plan, console)
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


@dataclass(frozen=True)
class _Source:
    """Teacher and data, opened."""

    teacher: MobileVlm
    facts: TeacherFacts
    processing: Processing
    dataset: LlavaDataset
    asked: Asked
    identities: dict[str, Identity]

    @staticmethod
    def open(config: CacheConfig) -> _Source:
        assert config.teacher is not None and config.data is not None
        index = config.cache / ROW_INDEX if config.ranks == 1 else None  # a temporary one for each of several
        rows = open_rows(config.data, config.image_folder, index)
        rows.check(missing_images=config.on_bad_image == "stop")
        teacher = load_vlm(config.teacher).requires_grad_(False)
        processing = chosen_processing(read_processing(config.teacher), config)
        facts = facts_of(teacher, config.teacher, processing)
        context, layers = teacher.config.text_config.max_position_embeddings, 0
        if config.student is not None:
            processing = _agreeing(config, processing)
            text = load_vlm(config.student).config.text_config  # a config alone would have to be read layout by layout
            context, layers = text.max_position_embeddings, text.num_hidden_layers
        asked = asked_by(config, layers)
        if "attention_groups" in asked.terms and not layers:
            raise UsageError("attention_groups compares with every layer of the student: give it by --student DIR")
        tokenizer = open_tokenizer(processing.tokenizer, config.student or config.teacher)
        dataset = LlavaDataset(rows, processing, tokenizer, context, teacher.config.visual_tokens)
        identity = processing_identity(processing)
        wanted = list(demands(asked, facts.sha256, identity).values())
        if config.storage.features:
            wanted.append(features_demand(facts.tower_sha256, identity))
        identities = {demand["part"]: stored_as(asked, config.storage, demand) for demand in wanted}
        return _Source(teacher, facts, processing, dataset, asked, identities)


class _Missing:
    """Which entries of a conversation no one has recorded yet."""

    def __init__(self, source: _Source, reader: ShardReader, digests: ImageDigests) -> None:
        self._hashes = {part: identity_hash(identity) for part, identity in source.identities.items()}
        self._reader, self._digests = reader, digests

    def contents(self, example: Example) -> Contents:
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


def _plan(config: CacheConfig, source: _Source, missing: _Missing, progress: Progress) -> _Plan:
    plan, done, images = _Plan(), set[bytes](), set[bytes]()
    task = progress.add_task("looking what is missing", total=len(source.dataset))
    for number in range(len(source.dataset)):
        progress.update(task, completed=number)
        example = source.dataset[number]
        try:
            contents = missing.contents(example)
        except UsageError as error:
            _leave_out(config, example, error, progress)
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


def _run(
    config: CacheConfig, source: _Source, missing: _Missing, plan: _Plan, writer: ShardWriter, progress: Progress
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
                _leave_out(config, source.dataset[number], error, progress)
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


def _leave_out(config: CacheConfig, example: Example, error: AlignKDError, progress: Progress) -> None:
    """Say that a row is left out, or raise what its image got wrong."""
    row = example["row"].number
    line = str(error) if isinstance(error, BadImageError) else f"row {row}: {error}"
    if config.on_bad_image == "stop":
        raise BadImageError(f"{line}; mend it and record again, or leave such rows out: --on-bad-image skip")
    progress.console.print(f"left out: {line}", soft_wrap=True)


def _batches(plan: _Plan, size: int) -> list[list[int]]:
    """Conversations of like length together; batches in an order that keeps the time left honest."""
    order = torch.tensor(plan.lengths).argsort(stable=True)
    batches = torch.tensor(plan.numbers)[order].split(size) if plan.numbers else ()
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [batches[i].tolist() for i in shuffled]


def _agreeing(config: CacheConfig, theirs: Processing) -> Processing:
    """The student's processing, which training encodes conversations by."""
    assert config.student is not None
    ours = chosen_processing(read_processing(config.student), config)
    if ours.image != theirs.image or sha256_of(ours.tokenizer_path) != sha256_of(theirs.tokenizer_path):
        raise UsageError(
            f"student {config.student} and teacher {config.teacher} have different tokenizers or see images "
            "differently; choose a pair that agrees"
        )
    return ours


def _check_disk(config: CacheConfig, plan: _Plan, console: Console) -> None:
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


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
