"""alignkd-distill as a user types it: the run end to end, and every mistake as one line with its exit code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import cli
from distill.models import load_vlm

MakeData = Callable[..., Path]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["alignkd-distill", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        return Result(int(left.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def models(reference: Path, tmp_path: Path) -> Path:
    """Copies that a test may spoil: student, teacher and their tower."""
    for name in ("student", "teacher", "clip-tiny"):
        shutil.copytree(reference / name, tmp_path / name)
    return tmp_path


def refused(result: Result, *parts: str, code: int = 2) -> None:
    line = result.err.strip().splitlines()[-1]
    assert result.code == code and result.out == ""
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == []


def test_two_steps_end_to_end(command: Command, models: Path, make_data: MakeData) -> None:
    fresh = models / "fresh"
    sizes = ("--hidden-size", 32, "--layers", 2, "--heads", 2, "--intermediate-size", 48, "--seed", 4)
    made = command("init", "--teacher", models / "teacher", "--output", fresh, *sizes)
    assert made.code == 0 and str(fresh) in made.out
    output = models / "trained"
    run = command(
        "--teacher", models / "teacher", "--student", fresh, "--data", make_data(), "--output", output,
        "--max-steps", 2, "--batch-size", 3, "--weights.attention-kl", 1, "--report", "tensorboard", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "Failed to load" not in run.err and "_pytree" not in run.err  # libraries' own warnings
    last = json.loads(run.out.splitlines()[-1])
    assert last["checkpoint"] == str(output) and last["steps"] == 2
    assert set(last["terms"]) == {"cross_entropy", "reverse_kl", "attention", "attention_kl", "visual", "focus"}
    before, after = load_vlm(fresh), load_vlm(output)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert any((output / "tensorboard").iterdir())
    assert sorted(path.name for path in models.iterdir() if "trained" in path.name) == ["trained"]


def test_existing_and_unfinished_outputs_are_refused(command: Command, models: Path, make_data: MakeData) -> None:
    words = ["--losses", "ce", "--student", models / "student", "--data", make_data(), "--output", models / "new"]
    words += ["--max-steps", 1]
    refused(command(*words, "--resume"), "nothing to resume", "new.work", "without --resume")
    (models / "new.work").mkdir()
    refused(command(*words), "an unfinished run lies in", "new.work", "--resume")
    (models / "new.work").rmdir()
    (models / "new").mkdir()
    refused(command(*words), "output", "new exists already")
    assert list((models / "new").iterdir()) == []


def test_resuming_with_other_settings_names_them(command: Command, models: Path, make_data: MakeData) -> None:
    work = models / "new.work"
    (work / "checkpoint-1").mkdir(parents=True)
    (work / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (work / "settings.json").write_text(json.dumps({"learning_rate": 4e-05}))
    words = ["--losses", "ce", "--student", models / "student", "--data", make_data(), "--output", models / "new"]
    refused(command(*words, "--learning-rate", 0.01, "--resume"), "learning_rate was 4e-05, is 0.01")


def test_all_wrong_flags_are_reported_at_once(command: Command, models: Path) -> None:
    words = ("--student", models / "student", "--data", "d.json", "--output", models / "new")
    result = command(*words, "--batch-size", 0, "--warmup", 1.5, "--temperature", -1, "--images", models / "none")
    refused(
        result, "--losses paper needs --teacher DIR", "--batch-size 0 must be above 0", "--warmup 1.5",
        "--temperature -1.0 must be above 0", "none is no folder",
    )  # fmt: skip
    off = command(*words, "--losses", "ce", "--weights.cross-entropy", 0)
    refused(off, "every loss term has weight 0")


def test_bad_checkpoints(command: Command, models: Path, make_data: MakeData) -> None:
    data, output = make_data(), models / "new"
    words = ("--data", data, "--output", output, "--max-steps", 1)
    pair = ("--student", models / "student", "--teacher", models / "teacher")
    refused(command("--losses", "ce", "--student", models / "nowhere", *words), "nowhere is no checkpoint")

    shutil.move(models / "clip-tiny", models / "away")
    weights = load_file(models / "student" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, models / "student" / "model.safetensors")
    refused(command(*pair, *words), "has no vision tower", "'clip-tiny' is no folder")
    shutil.move(models / "away", models / "clip-tiny")

    tokenizer = models / "teacher" / "tokenizer.model"
    good = tokenizer.read_bytes()
    tokenizer.write_bytes(good + b"\n\x00")  # still readable, no longer the student's
    result = command(*pair, *words)
    assert result.code == 2 and "tokenizer" in result.err
    tokenizer.write_bytes(good)
    assert not output.exists() and not (models / "new.work").exists()


def test_student_and_teacher_of_different_vocabularies(command: Command, models: Path, make_data: MakeData) -> None:
    from tests.distill.test_checkpoint import other_tokenizer

    other_tokenizer(models / "teacher" / "tokenizer.model", 512)
    words = ("--student", models / "student", "--teacher", models / "teacher", "--data", make_data())
    result = command(*words, "--output", models / "new")
    refused(result, "have different vocabularies (512 and 512 tokens, different tokenizer.model)", "--losses ce")
    other_tokenizer(models / "student" / "tokenizer.model", 400)
    result = command(*words, "--output", models / "new")
    refused(result, "has 400 tokens", "vocabulary of 512")


def test_bad_data(command: Command, models: Path, make_data: MakeData) -> None:
    def run(data: Path) -> Result:
        words = ("--losses", "ce", "--student", models / "student", "--data", data, "--output", models / "new")
        return command(*words, "--max-steps", 1)

    refused(run(models / "none.json"), "none.json does not exist", "alignkd-data make-demo")
    wrong = models / "wrong.json"
    wrong.write_text('{"a": 1}')
    refused(run(wrong), 'wrong.json row 0 is {"a": 1}', "conversations")
    refused(run(make_data(lambda rows: rows[3].update(image="images/none.png"))), "row 3", "none.png does not exist")
    data = make_data()
    (data.parent / "images" / "5.png").write_bytes(b"\x89PNG broken")
    refused(run(data), "row 5: image", "5.png", code=1)  # the data broke, not the command
    assert not (models / "new").exists() and not (models / "new.work").exists()


def test_init_refuses_bad_sizes_and_existing_output(command: Command, models: Path) -> None:
    words = ("init", "--teacher", models / "teacher", "--layers", 1, "--heads", 3, "--intermediate-size", 8)
    refused(command(*words, "--output", models / "x", "--hidden-size", 32), "--hidden-size 32", "--heads 3")
    refused(command(*words, "--output", models / "student", "--hidden-size", 30), "student exists already")
    assert not (models / "x").exists()
