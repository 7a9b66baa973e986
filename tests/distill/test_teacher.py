"""The teacher in fewer bits, in bfloat16 or offloaded: what it says then, and that training runs with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bundle.errors import UsageError
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.settings.training import DistillConfig
from distill.teacher.open_teacher import place_teacher, quantize_decoder
from distill.training.run import train

MakeData = Callable[..., Path]
DEMO = Path(__file__).parents[2] / "distill" / "demo_teacher"
CPU = torch.device("cpu")


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student", teacher=reference / "teacher", data=make_data(), output=tmp_path / "new",
        max_steps=3, batch_size=3, log_steps=1, learning_rate=1e-3, report="none",
    )  # fmt: skip


def logits(vlm: MobileVlm) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return vlm.logits(torch.randint(5, 200, (4, 24), generator=draw)).float()


def terms(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())["log"]
    return [{n: v for n, v in entry.items() if n.startswith("term/")} for entry in log if "loss" in entry]


@pytest.mark.parametrize(("bits", "error", "share"), [("8", 0.06, 0.30), ("4", 0.35, 0.45)])
def test_a_quantized_teacher_still_says_nearly_the_same(bits: str, error: float, share: float) -> None:
    """On the demo's trained teacher; random weights would say nothing of the error that matters."""
    teacher = load_vlm(DEMO)
    before = logits(teacher)
    weight = teacher.language_model.layers[0].mlp.up_proj.weight
    whole = weight.nbytes
    quantize_decoder(teacher, bits)
    after = logits(teacher)
    assert 1e-4 < float((after - before).norm() / before.norm()) < error
    agree = (after.argmax(-1) == before.argmax(-1)).float().mean()
    assert agree > (0.95 if bits == "8" else 0.8)
    packed = teacher.language_model.layers[0].mlp.up_proj.weight
    held = sum(vars(packed)[name].nbytes for name in packed.tensor_data_names)
    assert held < share * whole
    assert type(teacher.lm_head.weight.data) is torch.Tensor  # not the decoder's layers: stays whole


@pytest.mark.parametrize("bits", ["8", "4"])
def test_training_with_a_quantized_teacher(config: DistillConfig, bits: str) -> None:
    output = train(replace(config, teacher_bits=bits))
    values = terms(output)
    assert len(values) == 3 and all(torch.isfinite(torch.tensor(list(entry.values()))).all() for entry in values)
    assert f"--teacher-bits {bits}" in (output / "README.md").read_text()


def test_an_offloaded_teacher_says_the_same_and_holds_no_weights(config: DistillConfig, teacher: MobileVlm) -> None:
    expected = logits(teacher)
    place_teacher(teacher, replace(config, teacher_placement="cpu"), CPU)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
    torch.testing.assert_close(logits(teacher), expected)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


def test_training_with_an_offloaded_teacher_is_training_with_it(config: DistillConfig, tmp_path: Path) -> None:
    there = terms(train(config))
    away = terms(train(replace(config, teacher_placement="cpu", output=tmp_path / "away")))
    for one, two in zip(there, away, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_a_bfloat16_teacher(config: DistillConfig, tmp_path: Path) -> None:
    there = terms(train(config))
    coarse = terms(train(replace(config, teacher_dtype="bfloat16", output=tmp_path / "coarse")))
    assert coarse[0] == pytest.approx(there[0], rel=0.05, abs=0.01) and coarse[0] != there[0]


def test_training_in_bfloat16(config: DistillConfig, tmp_path: Path) -> None:
    there = terms(train(config))
    output = train(replace(config, bf16=True, output=tmp_path / "coarse"))
    assert terms(output)[0] == pytest.approx(there[0], rel=0.05, abs=0.01)
    assert load_vlm(output).dtype == torch.float32 and "1 process, bf16" in (output / "README.md").read_text()


def test_bits_and_offload_do_not_mix(config: DistillConfig) -> None:
    with pytest.raises(UsageError, match="--teacher-bits keeps the teacher on the device"):
        replace(config, teacher_bits="8", teacher_placement="cpu")


def test_template_and_strategy_are_chosen_for_training_and_kept(config: DistillConfig) -> None:
    output = train(replace(config, template="plain", image_strategy="crop", max_steps=1))
    saved = json.loads((output / "config.json").read_text())
    assert saved["prompt_template"] == "plain" and saved["image_aspect_ratio"] == "crop"
