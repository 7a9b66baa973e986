"""Training runs: what they write, that they learn, that a resumed run is a straight one, and that the input stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bundle.staging import sha256_of
from distill.align_kd.module import AlignKD
from distill.batches.image_store import ImageStore
from distill.data.rows import read_rows
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.settings.terms import TermWeights
from distill.settings.training import DistillConfig
from distill.training.features import known_features
from distill.training.run import train
from tests.distill.runs import break_off

MakeData = Callable[..., Path]


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student",
        teacher=reference / "teacher",
        data=make_data(),
        output=tmp_path / "trained",
        batch_size=2,
        max_steps=6,
        save_steps=3,
        log_steps=2,
        grad_norm_steps=2,
        learning_rate=1e-3,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapters = folder / "adapters.safetensors"
    return load_file(folder / "model.safetensors") | (load_file(adapters) if adapters.exists() else {})


def test_a_run_writes_a_checkpoint_with_card_adapters_and_log(config: DistillConfig, student: MobileVlm) -> None:
    hashes = {path: sha256_of(path) for folder in (config.student, config.teacher) for path in folder.iterdir()}  # type: ignore[union-attr]
    output = train(config)
    assert output == config.output and not config.work.exists()
    assert {path: sha256_of(path) for path in hashes} == hashes
    trained = load_vlm(output)
    before, after = student.state_dict(), trained.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("vision_tower.")}
    assert read_processing(output).image == read_processing(config.student).image
    adapters = load_file(output / "adapters.safetensors")
    fresh = AlignKD(student, load_vlm(config.teacher or ""), config.term_weights, seed=config.seed).adapter_state()
    assert set(adapters) == set(fresh)
    assert not any(torch.equal(adapters[name], fresh[name]) for name in fresh)  # adapters are trained too
    card = (output / "README.md").read_text()
    assert sha256_of(config.data) in card and "--learning-rate 0.001 --save-steps 3" not in card
    assert f"--data {config.data}" in card and "--max-steps 6" in card and "| attention | 1 |" in card


def test_the_log_has_every_term_and_its_gradient_norm(config: DistillConfig) -> None:
    log = json.loads((train(config) / "training_log.json").read_text())
    entries = [entry for entry in log["log"] if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 4, 6]
    terms = {"cross_entropy", "reverse_kl", "attention", "visual", "focus"}
    for entry in entries:
        assert {name.removeprefix("term/") for name in entry if name.startswith("term/")} == terms
        assert sum(entry[f"term/{name}"] for name in terms) == pytest.approx(entry["loss"], rel=1e-4)
    measured = entries[-1]
    assert {name.removeprefix("gradient_norm/") for name in measured if name.startswith("gradient_norm/")} == terms
    assert all(measured[f"gradient_norm/{name}"] > 0 for name in terms)
    assert log["facts"]["steps"] == 6 and log["facts"]["rows"] == 6


def test_plain_training_needs_no_teacher_and_learns(config: DistillConfig) -> None:
    plain = replace(config, teacher=None, losses="ce", max_steps=40, learning_rate=3e-3, save_steps=500)
    log = json.loads((train(plain) / "training_log.json").read_text())["log"]
    values = [entry["term/cross_entropy"] for entry in log if "loss" in entry]
    assert values[-1] < 0.5 * values[0]
    assert not (plain.output / "adapters.safetensors").exists()


def test_a_resumed_run_is_the_straight_run(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = weights(train(config))
    broken = replace(config, output=tmp_path / "broken")
    break_off(broken, 5)
    assert not broken.output.exists() and (broken.work / "checkpoint-3").is_dir()
    monkeypatch.setattr(
        "distill.training.run.fit_visual_maps", lambda *_: pytest.fail("the checkpoint brings the maps")
    )
    resumed = weights(train(replace(broken, resume=True)))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert not broken.work.exists()


def test_a_run_whose_last_files_could_not_be_written_is_finished_by_resuming(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, losses="ce", max_steps=4)  # ends inside an epoch of three steps
    straight = weights(train(config))
    broken = replace(config, output=tmp_path / "broken")

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("distill.training.finish.save_checkpoint", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(broken)
    (broken.work / "checkpoint-9").mkdir()  # killed while it wrote this one
    resumed = weights(train(replace(broken, resume=True)))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_run_killed_before_its_first_checkpoint_begins_again(config: DistillConfig) -> None:
    config = replace(config, losses="ce", max_steps=2)
    config.work.mkdir()
    assert train(replace(config, resume=True)) == config.output


def test_a_run_broken_off_before_its_first_checkpoint_leaves_nothing(config: DistillConfig) -> None:
    break_off(config, 1)
    assert not config.output.exists() and not config.work.exists()


def test_the_same_seed_gives_the_same_weights_and_another_other_ones(config: DistillConfig, tmp_path: Path) -> None:
    runs = [
        weights(train(replace(config, output=tmp_path / f"run{i}", seed=seed, max_steps=2)))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["lm_head.weight"], runs[2]["lm_head.weight"])


def test_known_features_change_nothing(config: DistillConfig, tmp_path: Path) -> None:
    stored = weights(train(replace(config, max_steps=2)))
    each_time = weights(train(replace(config, max_steps=2, cache_mb=0, output=tmp_path / "other")))
    for name, value in stored.items():
        torch.testing.assert_close(value, each_time[name], atol=1e-5, rtol=1e-4)


def test_features_are_kept_only_where_one_frozen_tower_sees_all(
    student: MobileVlm, teacher: MobileVlm, make_data: MakeData, reference: Path
) -> None:
    data = make_data()
    rows = read_rows(data, data.parent)
    images = ImageStore(read_processing(reference / "student").image, 0)
    weights_ = {"cross_entropy": 1.0, "reverse_kl": 1.0}
    module = AlignKD(student, teacher, weights_)
    features = known_features(module, rows, images, 1 << 30)
    assert features is not None and set(features) == {row.image for row in rows if row.image}
    assert next(iter(features.values())).shape == (24 * 24, 32)
    shares = [known_features(module, rows, images, 1 << 30, share=(number, 2)) for number in (0, 1)]
    assert [len(share or {}) for share in shares] == [2, 2]
    for share in shares:
        for image, values in (share or {}).items():
            torch.testing.assert_close(values, features.pop(image))
    assert not features
    assert known_features(module, rows, images, 1000) is None
    with torch.no_grad():
        next(teacher.vision_tower.parameters()).add_(1)
    assert known_features(AlignKD(student, teacher, weights_), rows, images, 1 << 30) is None
    assert (
        known_features(AlignKD(student, None, {"cross_entropy": 1.0}, freeze_tower=False), rows, images, 1 << 30)
        is None
    )


def test_single_weights_change_the_preset(config: DistillConfig) -> None:
    changed = replace(config, weights=TermWeights(attention=0.0, forward_kl=0.5, cross_entropy=2.0))
    expected = {"cross_entropy": 2.0, "reverse_kl": 1.0, "visual": 1.0, "focus": 1.0, "forward_kl": 0.5}
    assert changed.term_weights == expected
    log = json.loads((train(replace(changed, max_steps=2)) / "training_log.json").read_text())
    assert set(log["facts"]["terms"]) == set(expected)


def test_gradient_accumulation_sees_what_a_large_batch_sees(config: DistillConfig, tmp_path: Path) -> None:
    plain = replace(config, losses="ce", teacher=None, max_steps=1, batch_size=6, warmup=0.0, max_grad_norm=0.0)
    small = replace(plain, batch_size=3, gradient_accumulation=2, output=tmp_path / "small")
    losses = [
        next(e["loss"] for e in json.loads((train(c) / "training_log.json").read_text())["log"] if "loss" in e)
        for c in (plain, small)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # means over different numbers of supervised tokens
