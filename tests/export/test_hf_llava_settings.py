"""What a Hugging Face LLaVA may say otherwise than the plain ones: its ONNX bundle answers as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.frame import ExportJob, export_bundle
from tests.export.hf_answers import assert_same_answers
from tests.export.hf_checkpoints import VARIANTS, write_checkpoint


@pytest.mark.parametrize(("text", "tower", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_answers_of_other_settings_are_too(text: str, tower: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", text, tower, **changes)
    export_bundle(ExportJob(tmp_path / "m", "onnx", "fp32", tmp_path / "b"), progress=lambda line: None)
    assert_same_answers(tmp_path / "m", tmp_path / "b")
