"""Accuracy on held-out rows: per answer, per family, split over processes; what training writes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bundle.staging import sha256_of
from bundle.tokenizer import open_tokenizer
from distill.evaluation.held_out import HeldOut, answers_right, read_held_out
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.settings.training import DistillConfig
from distill.training.run import train

MakeData = Callable[..., Path]


def families(rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        row["family"] = ["colour", "shape"][number % 2]


def held_out(data: Path, reference: Path, limit: int = 100) -> HeldOut:
    processing = read_processing(reference / "student")
    tokenizer = open_tokenizer(processing.tokenizer, reference / "student")
    return read_held_out(data, limit, processing, tokenizer, 2048, 2)


def test_an_answer_is_right_when_greedy_decoding_would_write_it(student: MobileVlm, reference: Path) -> None:
    """Two answers in a row of text; the first is what the model would say, the second with its last token changed."""
    prompt, more = [1, 30, 31, 32], [40, 41]
    first = student.greedy(torch.tensor([prompt]), None, 3)
    second = student.greedy(torch.tensor([prompt + first + more]), None, 3)
    wrong = [*second[:2], (second[2] + 1) % 500]
    ids = [prompt + first + more + second, prompt + first + more + wrong]
    ignored = [-100] * len(prompt)
    labels = [ignored + first + [-100, -100] + second, ignored + first + [-100, -100] + wrong]
    size = read_processing(reference / "student").image.size
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(2, len(ids[0]), dtype=torch.long),
        "labels": torch.tensor(labels),
        "pixel_values": torch.zeros(1, 3, size, size),
    }
    with torch.no_grad():
        assert answers_right(student, batch) == ([2, 1], [2, 2])


def test_processes_that_share_the_rows_ask_every_answer_once(
    student: MobileVlm, make_data: MakeData, reference: Path
) -> None:
    rows = held_out(make_data(families), reference)
    assert len(rows) == 6 and rows.families == ["colour", "shape"]
    alone = rows.tally(student, torch.device("cpu"))
    parts = [rows.tally(student, torch.device("cpu"), index, 2) for index in range(2)]
    assert alone.asked == {"colour": 5, "shape": 3}  # rows 2 and 4 have two answers each, both of colour
    for family in rows.families:
        assert sum(part.asked[family] for part in parts) == alone.asked[family]
        assert sum(part.right[family] for part in parts) == alone.right[family]
    assert set(alone.percent()) == {"colour", "shape", "mean"}
    assert len(held_out(make_data(families), reference, limit=2)) == 2


def test_training_logs_it_and_the_card_shows_it(reference: Path, make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(families)
    config = DistillConfig(
        student=reference / "student", data=data, output=tmp_path / "new", losses="ce", max_steps=30, batch_size=6,
        learning_rate=1e-2, report="none", eval_data=data, eval_steps=20,
    )  # fmt: skip
    output = train(config)
    log = json.loads((output / "training_log.json").read_text())
    entries = [entry for entry in log["log"] if "accuracy/mean" in entry]
    assert [entry["step"] for entry in entries] == [20, 30]
    assert entries[-1]["accuracy/mean"] > 50  # it was trained on these very rows
    card = (output / "README.md").read_text()
    assert f"| colour | {entries[-1]['accuracy/colour']:.1f} |" in card and sha256_of(data) in card
    without = train(replace(config, eval_data=None, output=tmp_path / "plain"))
    with_evaluation, plain = ((folder / "model.safetensors").read_bytes() for folder in (output, without))
    assert with_evaluation == plain
