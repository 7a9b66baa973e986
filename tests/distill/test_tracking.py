"""Where curves go: TensorBoard by default, another tracker by name, a missing one as a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundle.errors import UsageError
from distill.settings.training import DistillConfig
from distill.training.run import train

MakeData = Callable[..., Path]
WANDB = """
import json, os, sys
from pathlib import Path
run, logged = None, []
class config(dict):
    def update(self, values, allow_val_change): super().update(values)
config = config()
class Run:
    id, summary = "r", {}
    def _label(self, code): pass
def init(project, name=None, **more):
    global run
    run = Run()
    logged.append({"project": project, "name": name, "dir": os.environ["WANDB_DIR"]})
def define_metric(*a, **k): pass
def log(values): logged.append(values)
def termwarn(*a, **k): pass
"""


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student", data=make_data(), output=tmp_path / "new", losses="ce", batch_size=3,
        max_steps=4, log_steps=2,
    )  # fmt: skip


def test_tensorboard_is_the_default_and_has_terms_norms_and_accuracy(config: DistillConfig) -> None:
    output = train(replace(config, grad_norm_steps=2, eval_data=config.data, eval_steps=2))
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"loss", "grad_norm", "learning_rate", "term/cross_entropy", "gradient_norm/cross_entropy", "accuracy/all"}
    assert {tag.removeprefix("train/") for tag in tags} >= wanted
    accuracy = next(tag for tag in tags if tag.endswith("accuracy/all"))
    assert [event.step for event in events.Scalars(accuracy)] == [2, 4]


def test_wandb_by_name(config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    for folder in ("sdk", "sdk/lib"):
        (package / folder / "__init__.py").touch()
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    train(replace(config, report="wandb"))
    logged = sys.modules.pop("wandb").logged
    assert logged[0] == {"project": "alignkd", "name": "new", "dir": str(tmp_path)}
    assert any("train/term/cross_entropy" in entry for entry in logged)


def test_a_tracker_that_is_not_installed_is_one_line(config: DistillConfig) -> None:
    with pytest.raises(UsageError, match="--report trackio needs the package 'trackio'; run: pip install trackio"):
        train(replace(config, report="trackio"))
    assert not config.output.exists() and not config.work.exists()
