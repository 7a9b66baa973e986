"""Hugging Face LLaVA on ExecuTorch, Core ML and Core AI: graphs answer as transformers does, and pass the verifier."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bundle.manifest import Target
from bundle.verify_cli import main as verify
from export.frame import ExportJob, export_bundle
from export.targets import PACKAGES
from tests.export.conftest import HfCheckpoint
from tests.export.hf_answers import assert_same_answers
from tests.export.hf_checkpoints import KINDS

# Core ML's cache is float16 at fp32 too; ExecuTorch rounds otherwise in its own softmax.
LOGIT_ERROR: dict[Target, float] = {"executorch": 1e-4, "coreml": 5e-3, "coreai": 1e-4}
FAST: tuple[Target, str, str] = ("coreml", "qwen2", "siglip_vision_model")


def marks_of(target: Target, text: str, tower: str) -> list[pytest.MarkDecorator]:
    """One case runs by default; Core AI's are skipped where its beta wheels are not installed."""
    missing = [package for package in PACKAGES[target] if find_spec(package) is None]
    skip = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (alignkd[{target}])")
    return [skip] if (target, text, tower) == FAST else [skip, pytest.mark.slow]


CASES = [
    pytest.param(target, text, tower, marks=marks_of(target, text, tower))
    for target in LOGIT_ERROR
    for text, tower in KINDS
]


@pytest.mark.parametrize(("target", "text", "tower"), CASES)
def test_float_answers_are_those_of_transformers(
    target: Target, text: str, tower: str, hf_checkpoint: HfCheckpoint, tmp_path: Path
) -> None:
    checkpoint = hf_checkpoint(text, tower)
    export_bundle(ExportJob(checkpoint, target, "fp32", tmp_path / "b"), progress=lambda line: None)
    assert_same_answers(checkpoint, tmp_path / "b", LOGIT_ERROR[target])


@pytest.mark.parametrize(("target", "text", "tower"), CASES)
def test_int4_passes_the_verifier(
    target: Target, text: str, tower: str, hf_checkpoint: HfCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(ExportJob(hf_checkpoint(text, tower), target, "int4", tmp_path / "b"), progress=lambda line: None)
    monkeypatch.setattr(sys, "argv", ["alignkd-verify", str(tmp_path / "b")])
    with pytest.raises(SystemExit) as stopped:
        verify()
    assert not stopped.value.code
