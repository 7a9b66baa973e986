"""The committed demo teacher: small, its record honest, and as good on pictures it has not seen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bundle.tokenizer import open_tokenizer
from distill.demo_world import demo_benchmarks
from distill.demo_world.demo_benchmarks import training_rows
from distill.demo_world.lessons import FAMILIES, TEXT_FAMILIES
from distill.demo_world.question import LETTERS, Question
from distill.demo_world.scene import COLOURS, SHAPES
from distill.evaluation.family_accuracy import family_accuracy
from distill.models import load_vlm
from distill.models.processing import read_processing

TEACHER = Path(demo_benchmarks.__file__).parents[1] / "demo_teacher"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_tokenizer_keeps_every_text(tmp_path: Path) -> None:
    processing = read_processing(TEACHER)
    tokenizer = open_tokenizer(processing.tokenizer, TEACHER)
    texts = [turn["value"] for row in training_rows(tmp_path, random.Random(1), 300) for turn in row["conversations"]]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*texts, "Ünseen words, \u2603!"])
    words = [*COLOURS, *SHAPES, *LETTERS, "Yes", "No", "0", "5"]
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    assert len(tokenizer.encode("\n" + Question("", "What?", "").prompt + " ASSISTANT:")) < 10


def test_teacher_is_small_and_recorded() -> None:
    size = sum(path.stat().st_size for path in TEACHER.iterdir())
    assert size < 10 << 20
    record = read_json(TEACHER / "accuracy.json")
    assert record["questions_per_family"] >= 1000 and set(record["percent_right"]) == {*FAMILIES, *TEXT_FAMILIES}
    assert min(record["percent_right"].values()) >= 95


def test_teacher_answers_every_family(tmp_path: Path) -> None:
    rows = demo_benchmarks.held_out_rows(tmp_path, "test", random.Random("fresh"), 100)
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    processing = read_processing(TEACHER)
    tokenizer = open_tokenizer(processing.tokenizer, TEACHER)
    accuracy = family_accuracy(load_vlm(TEACHER), processing, tokenizer, tmp_path / "test.json")
    assert set(accuracy) == {*FAMILIES, *TEXT_FAMILIES}
    assert min(accuracy.values()) >= 90 and sum(accuracy.values()) / len(accuracy) >= 97
