"""Hugging Face LLaVA on ExecuTorch and Core ML: lowered graphs answer as transformers does, and pass the verifier."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bundle.manifest import Target
from bundle.verify_cli import main as verify
from export.frame import ExportJob, export_bundle
from tests.export.conftest import HfCheckpoint
from tests.export.hf_answers import assert_same_answers
from tests.export.hf_checkpoints import KINDS

# Core ML's cache is float16 at fp32 too; ExecuTorch rounds otherwise in its own softmax.
LOGIT_ERROR: dict[Target, float] = {"executorch": 1e-4, "coreml": 5e-3}
FAST: tuple[Target, str, str] = ("coreml", "qwen2", "siglip_vision_model")
CASES = [
    pytest.param(target, text, tower, marks=() if (target, text, tower) == FAST else pytest.mark.slow)
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
