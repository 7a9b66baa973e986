"""A teacher cache with the rest of training: packed and bad images, several processes, gradient norms, the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import write_tar
from rich.console import Console
from safetensors.torch import load_file

from bundle.errors import UsageError
from bundle.tokenizer import open_tokenizer
from distill.align_kd.module import AlignKD
from distill.batches.collator import BAD_ROWS, Collator
from distill.batches.dataset import Example, LlavaDataset
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.image_source import PackedImage
from distill.data.rows import open_rows
from distill.launch.configs import launch_config
from distill.models import load_vlm
from distill.models.processing import read_processing
from distill.plan.plan import make_plan
from distill.plan.report import plan_lines
from distill.settings.recording import CacheConfig, CacheStorage
from distill.settings.training import DistillConfig
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.record import Recorded, record
from distill.teacher_cache.search import CacheSearch, Lacking
from distill.training.ranks import Ranks
from distill.training.recording import find_recording
from distill.training.run import train
from tests.distill.processes import launch

MakeData = Callable[..., Path]
WHOLE = CacheStorage(words=512, precision="float32")  # the tiny models' whole vocabulary
QUIET = Console(quiet=True)


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student", teacher=reference / "teacher", cache=tmp_path / "cache", data=make_data(),
        output=tmp_path / "trained", batch_size=3, max_steps=4, log_steps=1, grad_norm_steps=1, learning_rate=1e-3,
        report="none",
    )  # fmt: skip


def do_record(config: DistillConfig, storage: CacheStorage = WHOLE, console: Console = QUIET) -> Recorded:
    assert config.cache is not None
    recording = CacheConfig(
        cache=config.cache, teacher=config.teacher, student=config.student, data=config.data, storage=storage,
        template=config.template, image_strategy=config.image_strategy, on_bad_image=config.on_bad_image, batch_size=2,
    )  # fmt: skip
    return record(recording, console)


def log_of(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())["log"]
    kept = ("term/", "gradient_norm/", "rows_left_out")
    return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in log if "loss" in entry]


def assert_alike(ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=rel, abs=1e-6)


@pytest.mark.parametrize("features", [False, True])
def test_images_in_shards_some_bad_train_as_with_the_teacher(config: DistillConfig, features: bool) -> None:
    """Also another template and strategy than the checkpoints', and every term's gradient norm."""
    rows = json.loads(config.data.read_text())
    (config.data.parent / "images" / "3.png").write_bytes(b"no picture")
    shards = write_tar(config.data.parent, rows)
    config = replace(config, data=shards, on_bad_image="skip", image_strategy="stretch", template="plain")
    said = StringIO()
    done = do_record(config, replace(WHOLE, features=features), Console(file=said))
    assert (done.conversations, done.recorded, done.left_out) == (6, 5, 1)
    assert "left out: row 3: image" in said.getvalue()
    live = log_of(train(replace(config, cache=None, output=config.output.with_name("live")), QUIET))
    cached = log_of(train(replace(config, teacher=None), QUIET))
    assert cached[-1]["rows_left_out"] == live[-1]["rows_left_out"] > 0
    assert len(cached[0]) == 11
    assert_alike(cached, live, 1e-4 if features else 1e-5)


def test_a_bad_image_stops_the_recording_and_what_was_recorded_is_kept(config: DistillConfig) -> None:
    (config.data.parent / "images" / "5.png").write_bytes(b"no picture")
    with pytest.raises(BadImageError, match=r"row 5: image .*5\.png is no picture.*--on-bad-image skip"):
        do_record(config)
    with pytest.raises(UsageError, match=r"lacks .* conversations; complete it: alignkd-distill cache"):
        train(config, QUIET)
    (config.data.parent / "images" / "5.png").unlink()
    with pytest.raises(BadImageError, match=r"row 5: image .*5\.png cannot be read"):
        do_record(config)
    done = do_record(replace(config, on_bad_image="skip"))
    assert (done.conversations, done.left_out) == (5, 1)


@pytest.mark.parametrize("features", [False, True])
def test_a_batch_of_bad_images_alone_has_every_term(config: DistillConfig, features: bool) -> None:
    do_record(config, replace(WHOLE, features=features))
    student, processing = load_vlm(config.student), read_processing(config.student)
    rows = open_rows(config.data, config.image_folder)
    dataset = LlavaDataset(rows, processing, open_tokenizer(processing.tokenizer, config.student), 2048, 144)
    search = CacheSearch(config, student, processing)
    recording = search.chosen(search.lacking(dataset[i] for i in range(6)))
    collator = Collator(processing.tokenizer.pad_id, ImageStore(processing.image, 0), None, True, None, recording)
    module = AlignKD(student, None, config.term_weights, recorded_teacher=recording.shape)
    whole = module(**collator([dataset[i] for i in (0, 1, 2)]))
    for number in (0, 2):
        (config.data.parent / "images" / f"{number}.png").write_bytes(b"no picture")
    batch = collator([dataset[0], dataset[2]])
    assert batch.pop(BAD_ROWS).tolist() == [0, 2]
    terms = module(**batch)
    module.total(terms).backward()
    assert list(terms) == list(whole) and not any(terms.values())
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    mixed, alone = collator([dataset[0], dataset[3], dataset[1]]), collator([dataset[3], dataset[1]])
    assert mixed.pop(BAD_ROWS).tolist() == [0]
    for name, tensor in alone.pop("recorded").items():
        assert torch.equal(mixed["recorded"][name], tensor)


@pytest.mark.parametrize("engine", ["cpu_2_ddp", "cpu_2_fsdp2"])
def test_two_processes_read_one_cache(config: DistillConfig, engine: str, tmp_path: Path) -> None:
    rows = json.loads(config.data.read_text())
    config.data.write_text(json.dumps([*rows, *rows]))
    config = replace(config, batch_size=4, grad_norm_steps=0)  # as two processes of 2 together
    do_record(config)
    live = train(replace(config, cache=None, output=config.output.with_name("live")), QUIET)
    words = [
        "--student", config.student, "--cache", config.cache, "--data", config.data, "--output", config.output,
        "--batch-size", 2, "--max-steps", 4, "--log-steps", 1, "--learning-rate", 1e-3, "--grad-norm-steps", 0,
        "--report", "none",
    ]  # fmt: skip
    processes = launch(launch_config(engine), words, tmp_path)
    codes = [one.end() for one in processes]
    assert codes == [0, 0], "\n".join(one.err.read_text() for one in processes)
    assert_alike(log_of(config.output), log_of(live), 1e-4)
    for name in ("model.safetensors", "adapters.safetensors"):
        expected, found = load_file(live / name), load_file(config.output / name)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=2e-4, rtol=2e-3)


def test_two_processes_share_the_look_up(config: DistillConfig) -> None:
    do_record(config)
    student, processing = load_vlm(config.student), read_processing(config.student)
    asked: list[int] = []

    class Asked(LlavaDataset):
        def __getitem__(self, index: int) -> Example:
            asked.append(index)
            return super().__getitem__(index)

    class Second(Ranks):
        """The second of two processes; the first has found that one conversation lacks everything."""

        def __init__(self) -> None:
            self.index, self.count, self.main = 1, 2, False

        def agreed(self) -> AbstractContextManager[None]:  # type: ignore[override]
            return nullcontext()

        def gathered(self, value: Any) -> list[Any]:
            return [Lacking(dict.fromkeys(value.missing, 1), 3), value]

    tokenizer = open_tokenizer(processing.tokenizer, config.student)
    dataset = Asked(open_rows(config.data, config.image_folder), processing, tokenizer, 2048, 144)
    with pytest.raises(UsageError, match=r"lacks .*rows of 1.* of 6 conversations; complete it"):
        find_recording(config, Second(), student, processing, dataset, QUIET)
    assert asked == [1, 3, 5]


def test_a_packed_picture_is_the_same_content_as_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "shard.tar").write_bytes(b"....one two")
    digests = ImageDigests(tmp_path / "images.sqlite")
    one, two = PackedImage(tmp_path / "shard.tar", 4, 3, "a"), PackedImage(tmp_path / "shard.tar", 8, 3, "b")
    assert digests.digest(one) == digests.digest(tmp_path / "a.png") != digests.digest(two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.teacher_cache.image_digests.read_image", lambda _: pytest.fail("read again"))
        assert digests.digest(one) != digests.digest(two)
    with pytest.raises(UsageError, match="cut off"):
        digests.digest(PackedImage(tmp_path / "shard.tar", 8, 9, "c"))


def test_the_plan_knows_the_cache(config: DistillConfig) -> None:
    plan = make_plan(replace(config, cache=None), 1, "ddp", None)
    done = do_record(config, CacheStorage())
    assert plan.cache_bytes == done.whole_bytes  # no two rows share an image here
    assert "alignkd-distill cache" in "\n".join(plan_lines(plan, replace(config, cache=None), False))
    cached = make_plan(replace(config, teacher=None), 1, "ddp", None)
    assert cached.trained == plan.trained and cached.cache_bytes is None and cached.teacher_parameters == 0
    assert cached.memory.total < plan.memory.total
    assert f"teacher: recorded in {config.cache}, not run" in plan_lines(cached, replace(config, teacher=None), False)
    with pytest.raises(UsageError, match="is no teacher cache"):
        make_plan(replace(config, cache=config.data.parent), 1, "ddp", None)
