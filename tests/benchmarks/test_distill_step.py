"""The benchmark of the training step: tiny models end to end, what its arms compute, the table, the cards."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as it is run: its folder is on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("distill_step")


def test_the_command_measures_every_arm(load: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load.main(
            ["--shape", "tiny", "--batch", "1", "--repeats", "1", "--processor-time", "--json", str(tmp_path / "s")]
        )
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "s").read_text())
    names = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert names == list(facts["rows"]) and names[0] == load.PUBLISHED and load.OURS in names
    assert all(row["peak"] > 0 and len(row["seconds"]) == 1 for row in facts["rows"].values())
    assert "clock processor time" in printed and f"'{load.OURS}' is " in printed
    assert facts["term_differences"]["cross_entropy"] == 0 and 0 < facts["term_differences"]["reverse_kl"] < 0.1


def test_arms_that_only_save_work_have_the_same_loss_and_gradient(load: ModuleType) -> None:
    arms = load.make_arms("tiny", 1, "cpu", autocast=False)
    found = {}
    for name in (load.OURS, "alignkd, bf16 teacher, features known", "alignkd, teacher recorded", load.FROM_CACHE):
        loss = arms.steps[name]()
        loss.backward()
        gradients = [p.grad.clone() for p in arms.parameters() if p.grad is not None]
        assert len(gradients) > 20
        found[name] = (loss.detach(), gradients)
        arms.clear()
        assert all(p.grad is None for p in arms.parameters())
    for other in found.values():
        torch.testing.assert_close(other, found[load.OURS], atol=1e-6, rtol=1e-4)


def test_autocast_compares_with_a_published_step_in_the_same_arithmetic(load: ModuleType) -> None:
    arms = load.make_arms("tiny", 1, "cpu", autocast=True)
    assert list(arms.steps)[0] == load.PUBLISHED and "published, bf16 teacher" not in arms.steps
    assert load.term_differences(arms) == {}
    for step in arms.steps.values():
        step().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in arms.parameters())
        arms.clear()


def test_the_table_has_medians_ratios_and_the_share_of_the_peak(load: ModuleType) -> None:
    mib = 2**20
    rows = {
        load.PUBLISHED: load.Row([2.0, 4.0, 9.0], 100 * mib, 60 * mib, 8 * 10**12),
        load.OURS: load.Row([1.0, 1.0, 1.0], 40 * mib, 15 * mib, 5 * 10**12),
        load.FROM_CACHE: load.Row([0.5, 0.5, 0.5], 30 * mib, 15 * mib, 10**12),
    }
    lines = load.table(rows, 600, 100e12).splitlines()
    assert lines[3] == f"| {load.OURS} | 1 | 4.00x | 600 | 40 | 0.40x | 15 | 0.25x | 5 | 5 | 5% |"
    assert "unknown card" in load.table(rows, 600)
    assert "4.00x faster" in load.claim(rows) and "0.40x of its memory" in load.claim(rows)
    on_cpu = {name: load.Row(row.seconds, row.peak, row.peak_beside_gradients) for name, row in rows.items()}
    assert "TFLOP" not in load.table(on_cpu, 600)


def test_the_peak_of_a_card_is_that_of_its_own_line(load: ModuleType) -> None:
    cost = importlib.import_module("step_cost")
    assert cost.peak_rate("NVIDIA H100 80GB HBM3", True) == 989e12
    assert cost.peak_rate("NVIDIA H100 PCIe", True) == 756e12
    assert cost.peak_rate("NVIDIA A100-SXM4-80GB", False) == 19.5e12
    assert cost.peak_rate("NVIDIA L40S", True) == 362e12 and cost.peak_rate("NVIDIA L4", True) == 121e12
    assert cost.peak_rate("NVIDIA GeForce GTX 1080", True) is None


def test_operations_and_peak_bytes_are_those_of_the_step(load: ModuleType) -> None:
    cost = importlib.import_module("step_cost")
    left, right = torch.randn(1000, 1000, requires_grad=True), torch.randn(1000, 9000, requires_grad=True)

    def step() -> torch.Tensor:
        return (left @ right).sum()

    assert cost.operations(step) == 3 * 2 * 1000 * 1000 * 9000  # forward and two gradients
    left.grad = right.grad = None
    gradients, product = 4 * (1000 * 1000 + 1000 * 9000), 4 * 1000 * 9000
    assert cost.peak_bytes(step, "cpu") == pytest.approx(gradients + product, rel=0.3)
    assert left.grad is None, "measured in another process"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_line(load: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load.main(["--device", "cuda"])
    assert stopped.value.code == 2 and "this torch sees no GPU; use --device cpu" in capsys.readouterr().err
