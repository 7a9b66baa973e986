"""What cannot be exported is one line, exit code 2, before any work; it names the part and what is supported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UsageError
from bundle.manifest import Target
from distill.models.checkpoint import open_checkpoint
from distill.models.processing import read_processing
from export.onnx.activation import OPERATORS
from export.supported import ACTIVATIONS, check_supported
from tests.export.conftest import Command, HfCheckpoint
from tests.export.hf_checkpoints import SIZE, write_checkpoint


@pytest.mark.parametrize(("architecture", "words"), [
    ("Qwen2VLForConditionalGeneration", "positions in three dimensions"),
    ("Qwen2_5_VLForConditionalGeneration", "positions in three dimensions"),
    ("MiniCPMV", "cuts a picture into slices"),
    ("LlavaNextForConditionalGeneration", "cuts a picture into tiles"),
    ("Qwen2ForCausalLM", "a decoder without a vision tower"),
])  # fmt: skip
def test_other_architectures_are_named(architecture: str, words: str, run_export: Command, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    ran = run_export(tmp_path / "m", "--target", "onnx", "--output", tmp_path / "b")
    assert ran.code == 2
    assert f"architecture '{architecture}' is not supported" in ran.error and words in ran.error
    assert "supported: MobileVlm," in ran.error and ran.error.endswith("nearest is LlavaForConditionalGeneration")


def test_a_misspelt_architecture_gets_the_name_that_is_meant(run_export: Command, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"architectures": ["MobileLlamaForCasualLM"]}))
    ran = run_export(tmp_path / "m", "--target", "onnx", "--output", tmp_path / "b")
    assert ran.code == 2 and ran.error.endswith("the nearest is MobileLlamaForCausalLM")


@pytest.mark.parametrize(("part", "kind", "allowed"), [
    ("text_config", "mistral", "llama, qwen2"), ("vision_config", "pixtral", "clip_vision_model, siglip_vision_model"),
])  # fmt: skip
def test_other_parts_are_named(
    part: str, kind: str, allowed: str, hf_checkpoint: HfCheckpoint, run_export: Command, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hf_checkpoint("llama", "clip_vision_model"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config[part]["model_type"] = kind
    (folder / "config.json").write_text(json.dumps(config))
    ran = run_export(folder, "--target", "coreml", "--output", tmp_path / "b")
    assert ran.code == 2 and f"{part} model_type '{kind}' is not supported; supported: {allowed}" in ran.error


def refusal(folder: Path, context_length: int = 256, target: Target = "onnx") -> str:
    """The line for a checkpoint; the test fails if there is none."""
    with pytest.raises(UsageError) as refused:
        check_supported(folder, open_checkpoint(folder)[0], read_processing(folder), context_length, target)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}


@pytest.mark.parametrize(("text", "changes", "words"), [
    ("llama", {"text_changes": {"hidden_act": "mish"}}, "text_config hidden_act 'mish' can be trained but not exp"),
    ("llama", {"tower_changes": {"hidden_act": "tanh"}}, "vision_config hidden_act 'tanh' can be trained"),
    ("llama", {"projector_hidden_act": "sigmoid"}, "projector_hidden_act 'sigmoid'"),
    ("llama", {"text_changes": {"rope_parameters": DYNAMIC}}, "rope_type 'dynamic'"),
    ("llama", {"text_changes": {"head_dim": 24}}, "heads are 24 wide, onnx takes multiples of 16; export with"),
    ("qwen2", {"text_changes": WINDOW}, "sliding window of 100 tokens, exported ones to all 256"),
])  # fmt: skip
def test_other_settings_are_named(text: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", text, **changes)
    assert words in refusal(tmp_path / "m")


def test_what_is_refused_for_one_context_or_target_passes_for_another(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "qwen2", text_changes=WINDOW)
    write_checkpoint(tmp_path / "n", text_changes={"head_dim": 24})
    for name, context, target in (("m", 100, "onnx"), ("n", 256, "coreml"), ("n", 256, "executorch")):
        folder = tmp_path / name
        check_supported(folder, open_checkpoint(folder)[0], read_processing(folder), context, target)  # type: ignore[arg-type]


def test_an_image_rule_of_another_size_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    path = tmp_path / "m" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    path.write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=f"makes images of 32 pixels, the vision tower takes {SIZE}"):
        read_processing(tmp_path / "m")


def test_every_activation_has_its_onnx_operator() -> None:
    assert set(OPERATORS) == set(ACTIVATIONS)
