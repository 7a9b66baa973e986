"""Two gloo processes train as one does, replicated or sharded; a mistake in one of them ends both with one line."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.launch.configs import launch_config
from tests.distill.processes import Running, launch, start

MakeData = Callable[..., Path]
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture
def words(reference: Path, make_data: MakeData) -> list[object]:
    """Two conversations a process and step, six in the data: some batches are of text alone, most mix."""
    return [
        "--student", reference / "student", "--teacher", reference / "teacher", "--data", make_data(twelve),
        "--batch-size", 2, "--max-steps", STEPS, "--log-steps", 1, "--save-steps", 100, "--learning-rate", 1e-3,
        "--report", "none",
    ]  # fmt: skip


def twelve(rows: list[dict[str, Any]]) -> None:
    """Twelve conversations, of which four are text, one of them long."""
    rows += [dict(row, id=f"{row['id']}b") for row in rows]
    rows[7]["conversations"] = rows[7]["conversations"] * 4


def succeeded(processes: list[Running]) -> None:
    codes = [one.end() for one in processes]
    assert codes == [0] * len(processes), "\n".join(one.err.read_text() for one in processes)


def log_of(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())["log"]
    return [entry for entry in log if "loss" in entry]


@pytest.fixture
def alone(words: list[object], folder: Path) -> Path:
    """One process with batches of what two see at once."""
    output = folder / "alone"
    if not output.exists():
        succeeded([start([*words, "--output", output, "--batch-size", 4], folder)])
    return output


@pytest.mark.parametrize("config", ["cpu_2_ddp", "cpu_2_fsdp2"])
def test_two_processes_killed_and_resumed_train_as_one(
    words: list[object], folder: Path, alone: Path, config: str
) -> None:
    output = folder / config
    words = [*words, "--output", output, "--eval-data", words[5], "--eval-steps", 10, "--save-steps", 5]
    killed = launch(launch_config(config), words, folder)
    killed[0].wait_for(f"step 7/{STEPS}")
    for one in killed:
        one.process.kill()
    assert [one.end() for one in killed] == [-signal.SIGKILL] * 2
    processes = launch(launch_config(config), [*words, "--resume"], folder)
    succeeded(processes)
    assert processes[0].out.read_text().startswith(f"{output}: {STEPS} steps") and processes[1].out.read_text() == ""
    ours, theirs = log_of(alone), log_of(output)
    assert [entry["step"] for entry in theirs] == list(range(1, STEPS + 1))
    for one, two in zip(ours, theirs, strict=True):
        terms = [name for name in one if name == "loss" or name.startswith("term/")]
        assert len(terms) == 6
        assert {name: two[name] for name in terms} == pytest.approx({n: one[n] for n in terms}, rel=1e-4, abs=1e-6)
    ours_files = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in output.iterdir()) == ours_files
    for name in ("model.safetensors", "adapters.safetensors"):
        expected, found = load_file(alone / name), load_file(output / name)
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=2e-4, rtol=2e-3)
    accuracy = [
        entry for entry in json.loads((output / "training_log.json").read_text())["log"] if "accuracy/all" in entry
    ]
    assert [entry["step"] for entry in accuracy] == [10, 20]


def test_two_sharded_processes_train_in_bfloat16(words: list[object], folder: Path) -> None:
    """With adapters of their own, a term from every kind, and close to one process in the same arithmetic."""
    words = [*words, "--max-steps", 4, "--bf16", "--weights.normed-visual", 0.5, "--weights.attention-kl", 0.5]
    one, two = folder / "one_bf16", folder / "two_bf16"
    succeeded([start([*words, "--output", one, "--batch-size", 4], folder)])
    succeeded(launch(launch_config("cpu_2_fsdp2"), [*words, "--output", two], folder))
    for ours, theirs in zip(log_of(one), log_of(two), strict=True):
        terms = [name for name in ours if name.startswith("term/")]
        assert len(terms) == 7
        assert {name: theirs[name] for name in terms} == pytest.approx({n: ours[n] for n in terms}, rel=5e-2, abs=1e-3)
    assert all(value.dtype == torch.float32 for value in load_file(two / "adapters.safetensors").values())


def test_a_mistake_that_all_see_is_told_once(words: list[object], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    processes = launch(launch_config("cpu_2_ddp"), [*words, "--output", tmp_path / "there"], folder)
    assert [one.end() for one in processes] == [2, 2]
    lines = [one.err.read_text().splitlines() for one in processes]
    assert [line for line in lines[0] if line.startswith("error:")] == [
        f"error: output {tmp_path / 'there'} exists already; choose another --output or remove it first"
    ]
    assert lines[1] == []


@pytest.mark.parametrize("cache_mb", [0, 64])  # it is met in the training loop; or before, in one process's share
def test_an_image_that_one_process_cannot_read_ends_both(
    words: list[object], folder: Path, tmp_path: Path, cache_mb: int
) -> None:
    data = Path(str(words[5]))
    (data.parent / "images" / "5.png").write_bytes(b"\x89PNG broken")
    processes = launch(
        launch_config("cpu_2_ddp"), [*words, "--output", tmp_path / "new", "--cache-mb", cache_mb], folder
    )
    codes = [one.end() for one in processes]
    said = [line for one in processes for line in one.err.read_text().splitlines() if line.startswith("error:")]
    assert 0 not in codes
    assert len(said) == 1 and "row 5: image" in said[0] and "5.png" in said[0]
    assert ("of 2: row" in said[0]) == (cache_mb == 0)
    assert "Traceback" not in "".join(one.err.read_text() for one in processes)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.work").exists()
