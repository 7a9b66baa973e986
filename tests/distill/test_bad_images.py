"""Images that cannot be read while training runs: the row leaves its batch and is counted, or the run stops."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats import WRITERS
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from bundle.errors import UsageError
from bundle.tokenizer import open_tokenizer
from distill import cli
from distill.align_kd.module import AlignKD
from distill.batches.collator import BAD_ROWS, Collator
from distill.batches.dataset import LlavaDataset
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.rows import IndexedRows, open_rows, read_rows
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.settings.training import DistillConfig
from distill.training.bad_images import BadImages, LeftOut, read_all
from distill.training.features import known_features
from distill.training.progress import ProgressLine
from distill.training.run import train
from tests.distill.runs import break_off

MakeData = Callable[..., Path]


@pytest.fixture(scope="module")
def processing(reference: Path) -> Processing:
    return read_processing(reference / "student")


def dataset_of(rows: IndexedRows, processing: Processing, context: int = 2048, kept: int = 99) -> LlavaDataset:
    tokenizer = open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent)
    return LlavaDataset(rows, processing, tokenizer, context, visual_tokens=144, kept=kept)


def test_a_row_with_a_bad_image_leaves_its_batch(make_data: MakeData, processing: Processing) -> None:
    data = make_data()
    rows = read_rows(data)
    (data.parent / "images" / "2.png").write_bytes(b"no picture")
    dataset = dataset_of(rows, processing)
    store = ImageStore(processing.image, 0)
    batch = Collator(0, store, report_bad=True)([dataset[i] for i in (0, 2, 4)])
    without = Collator(0, store)([dataset[i] for i in (0, 4)])
    assert batch.pop(BAD_ROWS).tolist() == [2]
    assert batch.keys() == without.keys() and all(torch.equal(batch[name], without[name]) for name in batch)
    with pytest.raises(BadImageError, match=r"row 2: image .*2\.png is no picture"):
        Collator(0, store)([dataset[2]])


def test_a_batch_of_bad_images_alone_teaches_nothing(
    make_data: MakeData, processing: Processing, student: MobileVlm, teacher: MobileVlm
) -> None:
    data = make_data()
    rows = read_rows(data)
    for number in (0, 2):
        (data.parent / "images" / f"{number}.png").unlink()
    dataset = dataset_of(rows, processing)
    batch = Collator(0, ImageStore(processing.image, 0), report_bad=True)([dataset[0], dataset[2]])
    assert batch.pop(BAD_ROWS).tolist() == [0, 2]
    module = AlignKD(student, teacher, {"cross_entropy": 1.0, "reverse_kl": 1.0, "attention": 1.0, "visual": 1.0})
    total = module.total(module(**batch))
    total.backward()
    assert total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "RGBA", "LA", "1", "L", "F"])
def test_every_mode_of_a_picture_trains(mode: str, make_data: MakeData, processing: Processing) -> None:
    data = make_data(lambda rows: rows[0].update(image="images/odd.tif"))
    grey = np.linspace(0, 65535 if mode == "I;16" else 255, 64).reshape(8, 8)
    stored = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.uint8))
    picture = stored if mode == "I;16" else stored.convert(mode)
    picture.save(data.parent / "images" / "odd.tif")
    assert ImageStore(processing.image, 0).decode(read_rows(data)[0]).shape == (3, 336, 336)


def test_images_in_shards_train_as_files_do(make_data: MakeData, processing: Processing) -> None:
    data = make_data()
    files = read_rows(data)
    shards = read_rows(WRITERS["tar"](data.parent, json.loads(data.read_text())))
    store = ImageStore(processing.image, 0)
    for one, other in zip(files, shards, strict=True):
        assert (one.turns, one.image is None) == (other.turns, other.image is None)
        if one.image is not None:
            assert torch.equal(store.decode(one), store.decode(other))


def test_encoded_rows_are_kept_up_to_a_number(make_data: MakeData, processing: Processing) -> None:
    dataset = dataset_of(read_rows(make_data()), processing, kept=2)
    first = dataset[0]
    for number in range(6):
        dataset[number]
    assert len(dataset._encoded) == 2 and dataset[0] == first


def test_an_image_that_is_cut_off_with_its_question_is_not_put_into_the_batch(
    make_data: MakeData, processing: Processing
) -> None:
    def late(rows: list[dict[str, Any]]) -> None:
        rows[0]["conversations"] = [
            {"from": "human", "value": "word " * 80}, {"from": "gpt", "value": "yes"}, *rows[0]["conversations"]
        ]  # fmt: skip

    dataset = dataset_of(read_rows(make_data(late)), processing, context=200)
    batch = Collator(0, ImageStore(processing.image, 0))([dataset[0]])
    assert not batch["pixel_values"].any() and not (batch["input_ids"] == -200).any()  # the blank of a text batch


def test_features_leave_out_what_cannot_be_read(
    make_data: MakeData, processing: Processing, student: MobileVlm
) -> None:
    data = make_data()
    rows = read_rows(data)
    (data.parent / "images" / "5.png").unlink()  # the last one
    module, store = AlignKD(student, None, {"cross_entropy": 1.0}), ImageStore(processing.image, 0)
    with pytest.raises(BadImageError, match=r"row 5: image .*5\.png does not exist"):
        known_features(module, rows, store, 1 << 30)
    features = known_features(module, rows, store, 1 << 30, leave_out_bad=True)
    assert features is not None and len(features) == 3
    dataset = dataset_of(rows, processing)
    batch = Collator(0, store, features, report_bad=True)([dataset[0], dataset[5]])
    assert batch[BAD_ROWS].tolist() == [5] and len(batch["image_features"]) == 1


def test_the_list_forgets_the_steps_that_a_resumed_run_repeats(
    make_data: MakeData, processing: Processing, tmp_path: Path
) -> None:
    data = make_data()
    (data.parent / "images" / "3.png").write_bytes(b"")
    rows, store, quiet = open_rows(data), ImageStore(processing.image, 0), Console(quiet=True)
    first = BadImages(rows, store, "skip", tmp_path / "work", quiet)
    for step in (1, 4, 7):
        first.meet([3], step)
    with (tmp_path / "work" / "bad_images.0.jsonl").open("a") as file:
        file.write('{"step": 9, "ro')  # killed while it wrote
    again = BadImages(rows, store, "skip", tmp_path / "work", quiet, first_step=5)
    assert again.count == 2
    again.meet([3], 5)
    assert [(one.step, one.row) for one in read_all(tmp_path / "work")] == [(1, 3), (4, 3), (5, 3)]
    assert "3.png is no picture" in read_all(tmp_path / "work")[0].reason
    other = BadImages(rows, store, "skip", tmp_path / "work", quiet, process=1)
    other.meet([0], 2)
    assert [(one.step, one.row) for one in read_all(tmp_path / "work")] == [(1, 3), (2, 0), (4, 3), (5, 3)]
    assert isinstance(read_all(tmp_path / "work")[1], LeftOut)


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student", data=make_data(), output=tmp_path / "trained", losses="ce",
        batch_size=2, max_steps=6, save_steps=2, log_steps=1, grad_norm_steps=0, cache_mb=0, on_bad_image="skip",
    )  # fmt: skip


def spoil_at(step: int, path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil an image while training runs, at the end of a step."""

    def on_step_end(self: ProgressLine, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            path.unlink() if fault == "missing" else path.write_bytes(path.read_bytes()[:200])

    monkeypatch.setattr(ProgressLine, "on_step_end", on_step_end)


def test_a_run_counts_and_names_the_rows_it_left_out_and_a_resumed_run_counts_the_same(
    config: DistillConfig, tmp_path: Path
) -> None:
    (config.data.parent / "images" / "3.png").write_bytes(b"no picture")
    output = train(config)
    log = json.loads((output / "training_log.json").read_text())
    assert log["facts"]["rows_left_out"] == 1 and list(log["rows_left_out"]) == ["3"]
    assert "row 3: image" in log["facts"]["left_out_first"][0]
    counts = [entry["rows_left_out"] for entry in log["log"] if "loss" in entry]
    assert counts == sorted(counts) and counts[-1] == 2  # two epochs
    assert "1 rows were left out, their image could not be read" in (output / "README.md").read_text()

    broken = replace(config, output=tmp_path / "broken")
    break_off(broken, 5)
    resumed = train(replace(broken, resume=True))
    again = json.loads((resumed / "training_log.json").read_text())
    assert [entry["rows_left_out"] for entry in again["log"] if "loss" in entry][-1] == 2
    one, other = (load_file(folder / "model.safetensors") for folder in (output, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fault,message", [("missing", "does not exist"), ("cut", "is damaged or truncated")])
def test_a_bad_image_in_mid_run_stops_it_with_a_line_and_can_be_skipped_on_resuming(
    fault: str,
    message: str,
    config: DistillConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = config.data.parent / "images" / "5.png"
    words = [
        "alignkd-distill", "--student", config.student, "--data", config.data, "--output", config.output,
        "--losses", "ce", "--batch-size", 2, "--max-steps", 6, "--save-steps", 2, "--cache-mb", 0,
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        spoil_at(3, image, fault, patch)  # after the first epoch: the image is read again in the second
        patch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as left:
            cli.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 1 and not config.output.exists()
    assert lines[-1].startswith(f"error: row 5: image {image.resolve()} {message}")
    assert "--on-bad-image skip" in lines[-1] and "continue with --resume" in " ".join(lines[:-1])
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--resume", "--on-bad-image", "skip"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0 and config.output.is_dir()


def test_worker_processes_report_what_they_could_not_read(config: DistillConfig) -> None:
    (config.data.parent / "images" / "3.png").write_bytes(b"")
    log = json.loads((train(replace(config, workers=2, max_steps=3)) / "training_log.json").read_text())
    assert list(log["rows_left_out"]) == ["3"] and "3.png is no picture" in log["rows_left_out"]["3"]


def test_pictures_that_a_shard_lacks_are_left_out_or_stop_the_run_before_it_begins(
    config: DistillConfig, tmp_path: Path
) -> None:
    rows = json.loads(config.data.read_text())
    (config.data.parent / "images" / "3.png").write_bytes(b"")
    (config.data.parent / "images" / "5.png").unlink()
    data = WRITERS["tar"](config.data.parent, rows)
    with pytest.raises(UsageError, match="row 5: sample 00005 of s-000001.tar names an image and holds no picture"):
        train(replace(config, data=data, on_bad_image="stop"))
    assert not config.work.exists()
    log = json.loads((train(replace(config, data=data, max_steps=3)) / "training_log.json").read_text())
    assert sorted(log["rows_left_out"]) == ["3", "5"]
    assert all("has no bytes in its shard" in reason for reason in log["rows_left_out"].values())


def test_training_reads_shards_and_messages(config: DistillConfig, tmp_path: Path) -> None:
    rows = json.loads(config.data.read_text())
    losses = []
    for name in ("list", "tar", "parquet"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "images").symlink_to(config.data.parent / "images")
        data = WRITERS[name](folder, rows)
        run = replace(config, data=data, images=config.data.parent, output=tmp_path / f"out-{name}", max_steps=2)
        log = json.loads((train(run) / "training_log.json").read_text())
        losses.append([entry["loss"] for entry in log["log"] if "loss" in entry])
        assert log["facts"]["rows"] == 6 and len(log["facts"]["data_sha256"]) == 64
    assert losses[0] == losses[1] == losses[2]
