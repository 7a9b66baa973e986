"""Real processes, killed at any moment or asked to stop: what --resume makes of them is what a straight run makes."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distill.processes import Running, start

MakeData = Callable[..., Path]
STEPS = 12
MEASURED = ("epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


@pytest.fixture
def words(reference: Path, make_data: MakeData) -> list[object]:
    return [
        "--student", reference / "student", "--teacher", reference / "teacher", "--data", make_data(),
        "--batch-size", 2, "--max-steps", STEPS, "--log-steps", 2, "--save-steps", 3, "--learning-rate", 1e-3,
        "--grad-norm-steps", 4, "--report", "none",
    ]  # fmt: skip


def killed_and_resumed(words: list[object], folder: Path, seed: int, kept: Path) -> Path:
    """Killed twice at random, the second time at a later step, then left to finish."""
    output, draw = folder / "killed", random.Random(seed)
    steps = sorted(draw.sample(range(2, STEPS), 2))
    for number, step in enumerate(steps):
        run = start([*words, "--output", output, *(["--resume"] if number else [])], folder)
        run.wait_for(f"step {step}/{STEPS}" if step % 2 == 0 else f"step {step - 1}/{STEPS}")
        assert run.process.pid is not None
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        assert not output.exists()
    finished = start([*words, "--output", output, "--resume"], folder, kept=kept)
    assert finished.end() == 0, finished.err.read_text()
    return output


def entries(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())["log"]
    return [{name: value for name, value in entry.items() if name not in MEASURED} for entry in log]


def same(one: Any, two: Any) -> bool:
    """Equal to the bit, through dicts, lists and tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool((one == two) if not hasattr(one, "shape") else (one == two).all())


@pytest.mark.parametrize(
    ("seed", "more"),
    [(1, ()), (2, ("--lora.rank", 4, "--lora.dropout", 0.2, "--gradient-accumulation", 2, "--learned-balance"))],
    ids=["all-weights", "lora"],
)
def test_a_run_killed_at_random_and_resumed_is_the_straight_run(
    words: list[object], tmp_path: Path, seed: int, more: tuple[object, ...]
) -> None:
    words = [*words, *more]
    kept = [tmp_path / "straight-work", tmp_path / "killed-work"]
    straight = start([*words, "--output", tmp_path / "straight"], tmp_path, kept=kept[0])
    output = killed_and_resumed(words, tmp_path, seed, kept[1])
    assert straight.end() == 0, straight.err.read_text()
    for name in ("model.safetensors", "adapters.safetensors"):
        assert same(load_file(tmp_path / "straight" / name), load_file(output / name))
    assert entries(output) == entries(tmp_path / "straight")
    last = f"checkpoint-{STEPS}"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(folder / last / name, weights_only=False) for folder in kept]
        assert same(*states), name
    if more:
        lora = [load_file(folder / "lora" / "adapter_model.safetensors") for folder in (tmp_path / "straight", output)]
        assert same(*lora) and all(value.abs().sum() > 0 for value in lora[0].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_step(
    words: list[object], tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "stopped"
    run: Running = start([*words, "--max-steps", 400, "--save-steps", 1000, "--output", output], tmp_path)
    run.wait_for("step 20/400")
    assert run.process.pid is not None
    os.kill(run.process.pid, number)
    assert run.end() == 128 + number
    last = run.err.read_text().splitlines()[-1]
    [checkpoint] = (tmp_path / "stopped.work").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert last == f"error: stopped at step {step}; its checkpoint is kept in {output}.work: continue with --resume"
    assert not output.exists() and step < 400
    if number == signal.SIGTERM:
        more = start([*words, "--max-steps", 400, "--output", output, "--resume"], tmp_path)
        more.wait_for("/400: ")
        first = int(more.err.read_text().split("step ")[1].split("/")[0])
        assert step < first <= step + 2 * 20  # a line each twenty steps, and the first may come late
        assert more.process.pid is not None
        os.kill(more.process.pid, signal.SIGKILL)
        more.end()
