"""experiments/align_kd: arms are runs of alignkd-distill, a small one goes through, the report's numbers are right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from distill.settings.terms import PRESETS
from distill.settings.training import DistillConfig

HERE = Path(__file__).parents[1] / "experiments" / "align_kd"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(HERE))

    def module(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return __import__(name)

    return module


def test_every_arm_is_a_run_of_the_product(load: Load, tmp_path: Path) -> None:
    arms = load("arms").ARMS
    for arm in arms.values():
        config = DistillConfig(
            student=tmp_path, teacher=tmp_path, data=tmp_path, output=tmp_path / "new", **arm.settings
        )
        assert config.term_weights["cross_entropy"] == 1
    assert {arm.settings["losses"] for arm in arms.values()} == set(PRESETS)
    assert set(arms["paper"].settings) == {"losses"}  # as a user gets it


def test_groups_hold_every_family_once(load: Load) -> None:
    from distill.demo_world.lessons import FAMILIES, TEXT_FAMILIES

    families = load("families")
    listed = [name for names in families.GROUPS.values() for name in names]
    assert sorted(listed) == sorted([*FAMILIES, *TEXT_FAMILIES])
    accuracy = dict.fromkeys(listed, 50.0) | {"existence": 80.0}
    assert families.mean_accuracy(accuracy) == pytest.approx((5 * 50 + 80) / 6)


def test_report_pairs_seeds(load: Load, tmp_path: Path) -> None:
    families = [name for names in load("families").GROUPS.values() for name in names]
    values = {"ce": {1: 60.0, 2: 70.0, 3: 50.0}, "ours": {1: 64.0, 2: 72.0, 3: 56.0, 9: 1.0}}
    for arm, seeds in values.items():
        for seed, percent in seeds.items():
            run = {
                "arm": arm, "seed": seed, "seconds": 60.0, "gradient_norms": [{"step": i} for i in range(3)],
                "accuracy": {split: dict.fromkeys(families, percent) for split in ("test", "unseen")},
            }  # fmt: skip
            (tmp_path / f"{arm}.600.{seed}.json").write_text(json.dumps(run))
    report = load("report")
    (tmp_path / "ours.3000.1.json").write_text((tmp_path / "ours.600.9.json").read_text())
    runs = report.read_runs(tmp_path, 600)  # other sizes of the training set stay out
    found = report.difference(runs["ours"], runs["ce"], "test")
    assert found.mean == pytest.approx(4)  # seed 9 has no partner
    assert (found.low, found.high) == pytest.approx((4 - 4.968, 4 + 4.968), abs=1e-3)  # 4.303 * 2 / sqrt(3)
    assert "| ours | 4 |" in report.overview(runs)[2] + report.overview(runs)[3]
    runs["paper"] = {1: runs["ours"][2], 2: runs["ours"][2]}
    assert report.pairs(runs)[2:] == ["| ours | paper | 2 | -4.0 [-54.8, +46.8] | -4.0 [-54.8, +46.8] |"]


def test_a_small_run_goes_through(tmp_path: Path) -> None:
    words = ["--arms", "ours", "--seeds", "1", "--scenes", "8", "--per-family", "1", "--steps", "3", "--batch", "4"]
    command = [
        sys.executable,
        str(HERE / "run.py"),
        *words,
        "--data",
        str(tmp_path / "d"),
        "--output",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "ours.8.1.json").read_text())
    assert [entry["step"] for entry in result["gradient_norms"]][0] == 1 and result["steps"] == 3
    assert set(result["accuracy"]) == {"validation", "test", "unseen"} and len(result["accuracy"]["test"]) == 14
    again = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert again.returncode == 0 and "seed 1" not in again.stderr  # made once
