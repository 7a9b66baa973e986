"""Maps between visual tokens start at the least-squares fit; a shuffled teacher sees another row's picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from bundle.errors import UsageError
from bundle.tokenizer import open_tokenizer
from distill.align_kd.module import AlignKD
from distill.batches.collator import Collator
from distill.batches.dataset import LlavaDataset
from distill.batches.image_store import ImageStore, OtherRowsImages
from distill.data.rows import read_rows
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.settings.training import DistillConfig
from distill.training.adapter_start import fit_visual_maps
from distill.training.run import train

if TYPE_CHECKING:
    from tests.distill.conftest import Case

MakeData = Callable[..., Path]


def opened(data: Path, reference: Path, module: AlignKD) -> tuple[LlavaDataset, Collator]:
    processing = read_processing(reference / "student")
    tokenizer = open_tokenizer(processing.tokenizer, reference / "student")
    rows = read_rows(data, data.parent)
    dataset = LlavaDataset(rows, processing, tokenizer, 2048, module.student.config.visual_tokens)
    return dataset, Collator(0, ImageStore(processing.image, 1 << 30))


def test_the_fit_is_least_squares_over_all_images(
    student: MobileVlm, teacher: MobileVlm, make_data: MakeData, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.training.adapter_start.IMAGES_PER_BATCH", 3)
    module = AlignKD(student, teacher, {"visual": 1.0, "normed_visual": 1.0})
    dataset, collator = opened(make_data(), reference, module)
    assert fit_visual_maps(module, dataset, collator) == 4  # six rows, two without an image
    with_image = [i for i in range(6) if dataset.rows.with_image[i]]
    pixels = collator([dataset[i] for i in with_image])["pixel_values"]
    with torch.no_grad():
        ours, theirs = (vlm.encode_images(pixels).flatten(0, 1) for vlm in (student, teacher))
    for linear, source, target in ((module.visual_map, theirs, ours), (module.student_map, ours, theirs)):
        assert linear is not None
        with_one = torch.cat([source, torch.ones_like(source[:, :1])], 1)
        best = with_one @ torch.linalg.lstsq(with_one, target, driver="gelsd").solution
        found = linear(source).detach()
        error, least = (found - target).square().mean().item(), (best - target).square().mean().item()
        assert error == pytest.approx(least, rel=1e-2, abs=1e-6) and error < target.var().item()


def test_maps_of_the_published_code_stay_at_random(
    student: MobileVlm, teacher: MobileVlm, make_data: MakeData, reference: Path
) -> None:
    module = AlignKD(student, teacher, {"visual": 1.0, "published_focus": 1.0})
    before = {name: value.clone() for name, value in module.adapter_state().items()}
    dataset, collator = opened(make_data(), reference, module)
    fit_visual_maps(module, dataset, collator)
    assert all(torch.equal(value, before[name]) for name, value in module.adapter_state().items())


def test_nothing_is_read_where_there_is_nothing_to_fit(
    student: MobileVlm, make_data: MakeData, reference: Path
) -> None:
    module = AlignKD(student, None, {"cross_entropy": 1.0})
    dataset, collator = opened(make_data(), reference, module)
    (dataset.rows[0].image or Path()).unlink()  # would raise if it were opened
    assert fit_visual_maps(module, dataset, collator) == 0


def test_a_shuffled_teacher_sees_the_next_picture(make_data: MakeData, reference: Path, case: Case) -> None:
    data = make_data()
    rows = read_rows(data, data.parent)
    store = ImageStore(read_processing(reference / "student").image, 1 << 30)
    other = OtherRowsImages(store, rows)
    for here, there in ((0, 2), (2, 3), (3, 5), (5, 0)):  # rows 1 and 4 have no image
        assert torch.equal(other.pixels(rows[here]), store.pixels(rows[there]))


def test_the_control_changes_what_is_taught_and_nothing_else(
    make_data: MakeData, reference: Path, tmp_path: Path
) -> None:
    data = make_data()

    def first_terms(name: str, shuffled: bool) -> dict[str, float]:
        output = tmp_path / name
        config = DistillConfig(
            student=reference / "student", teacher=reference / "teacher", data=data, output=output, max_steps=1,
            batch_size=6, grad_norm_steps=0, report="none", shuffled_teacher=shuffled, adapter_init="random",
        )  # fmt: skip
        train(config, Console(quiet=True))
        return json.loads((output / "training_log.json").read_text())["facts"]["terms"]

    plain, control = first_terms("plain", False), first_terms("control", True)
    assert control["cross_entropy"] == pytest.approx(plain["cross_entropy"], rel=1e-5)
    assert abs(control["reverse_kl"] - plain["reverse_kl"]) > 1e-3 and abs(control["visual"] - plain["visual"]) > 1e-4


def test_a_recording_cannot_be_shuffled(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shuffled-teacher needs a teacher that runs; leave --cache out"):
        DistillConfig(student=reference, data=reference, output=tmp_path / "new", cache=tmp_path, shuffled_teacher=True)


def test_ours_brings_its_temperature_and_a_given_one_wins(reference: Path, tmp_path: Path) -> None:
    config = DistillConfig(student=reference, teacher=reference, data=reference, output=tmp_path / "new", losses="ours")
    assert config.divergence_temperature == 4
    assert dataclasses.replace(config, temperature=2.0).divergence_temperature == 2
    assert dataclasses.replace(config, losses="paper").divergence_temperature == 1
