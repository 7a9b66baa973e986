"""Hugging Face LLaVA checkpoints on ONNX: a bundle answers as transformers does with the checkpoint's own processor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.manifest import read_manifest
from bundle.verify_cli import main as verify
from export.frame import ExportJob, export_bundle
from tests.export.conftest import HfCheckpoint
from tests.export.hf_answers import assert_same_answers
from tests.export.hf_checkpoints import KINDS


@pytest.mark.parametrize(("text", "tower"), KINDS)
def test_answers_are_those_of_transformers(text: str, tower: str, hf_checkpoint: HfCheckpoint, tmp_path: Path) -> None:
    checkpoint = hf_checkpoint(text, tower)
    manifest = export_bundle(ExportJob(checkpoint, "onnx", "fp32", tmp_path / "b"), progress=lambda line: None)
    assert manifest.tokenizer.kind == "tokenizers" and manifest.tokenizer.path in manifest.files
    assert manifest.prompt.template == "chat" and manifest.tokenizer.bos_id == (1 if text == "llama" else None)
    assert manifest.model.num_kv_heads == 2 and manifest.model.visual_tokens == 9
    assert_same_answers(checkpoint, tmp_path / "b")


def verified(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether alignkd-verify ends with 0."""
    monkeypatch.setattr(sys, "argv", ["alignkd-verify", str(bundle)])
    with pytest.raises(SystemExit) as stopped:
        verify()
    return not stopped.value.code


@pytest.mark.parametrize(("text", "tower"), KINDS)
def test_int4_passes_the_verifier(
    text: str, tower: str, hf_checkpoint: HfCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(ExportJob(hf_checkpoint(text, tower), "onnx", "int4", tmp_path / "b"), progress=lambda line: None)
    assert verified(tmp_path / "b", monkeypatch)
    assert read_manifest(tmp_path / "b").quantization["text_decoder"].weights.startswith("int4")


def test_a_forgotten_bias_is_found(
    hf_checkpoint: HfCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_export: Callable[..., Any]
) -> None:
    from export.onnx.linear import ModelWriter

    monkeypatch.setattr(ModelWriter, "bias_of", lambda self, layers: None)
    checkpoint = hf_checkpoint("qwen2", "clip_vision_model")
    ran = run_export(checkpoint, "--target", "onnx", "--fp32", "--output", tmp_path / "b")
    assert ran.code == 3 and "kind graph" in ran.error and not (tmp_path / "b").exists()
