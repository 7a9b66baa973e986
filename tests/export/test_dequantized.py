"""export.dequantized: the weights that files hold against the checkpoint's, by a rule that knows no packing."""

from __future__ import annotations

import pytest
import torch

from bundle.errors import VerificationError
from export.dequantized import load_dequantized, rounded, rounded_weights, target_storage
from export.onnx_weights import pack, unpack
from export.recipe import Storage
from tests.export.models import random_vlm

UP = "language_model.layers.0.mlp.up_proj.weight"


def test_rounding_known_answers() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert rounded(weight, Storage(4, None)).tolist() == [[7.0, -3.0, 1.0, 0.0], [0.0] * 4]
    assert rounded(weight, Storage(4, 2)).tolist()[0] == pytest.approx([7.0, -3.0, 0.6, 0.0])
    assert torch.equal(rounded(weight, Storage(32, None)), weight)
    assert float(rounded(torch.tensor([1 + 2.0**-12]), Storage(16, None))) == 1.0


def test_what_a_target_stores_otherwise_than_the_recipe() -> None:
    assert target_storage("lm_head.weight", (512, 64), "onnx", "int4") == Storage(8, None)
    assert target_storage("lm_head.weight", (512, 64), "executorch", "int4") == Storage(4, 32)
    assert target_storage("lm_head.weight", (512, 80), "executorch", "int4") == Storage(8, None), "32 does not divide"
    norm = "language_model.norm.weight"
    assert target_storage(norm, (64,), "coreml", "int4") == Storage(16, None)
    assert (
        target_storage(norm, (64,), "onnx", "int4")
        == target_storage(norm, (64,), "coreml", "fp32")
        == Storage(32, None)
    )


@torch.no_grad()
def test_rounded_weights_end_with_their_block() -> None:
    vlm = random_vlm()
    before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
    ids = torch.tensor([[1, 5, 9, 3]])
    exact = vlm.logits(ids)
    with rounded_weights(vlm, "onnx", "int4"):
        four = vlm.logits(ids)
    with rounded_weights(vlm, "onnx", "int8"):
        eight = vlm.logits(ids)
    assert float((four - exact).norm()) > 5 * float((eight - exact).norm()) > 0
    assert all(torch.equal(weight, before[name]) for name, weight in vlm.state_dict().items())
    for name in (UP, "lm_head.weight"):
        vlm.get_parameter(name).copy_(rounded(before[name], target_storage(name, before[name].shape, "onnx", "int4")))
    assert vlm.state_dict()[UP].unique().numel() < before[UP].unique().numel(), "the reference really rounds"


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
def test_our_packer_stays_within_the_limit_and_a_wrong_scale_does_not(bits: int, group: int) -> None:
    vlm = random_vlm(hidden=128)
    name = UP if bits == 4 else "lm_head.weight"
    with torch.no_grad():
        vlm.get_parameter(name).copy_(torch.randn(vlm.get_parameter(name).shape) * torch.logspace(-3, 0, 128))
    weight = vlm.get_parameter(name).detach().clone()
    packed = pack(weight.numpy(), bits, group)
    stored = torch.from_numpy(unpack(packed))
    load_dequantized(vlm, {name: stored}, "onnx", "int4")
    assert torch.equal(vlm.state_dict()[name], stored)

    vlm.get_parameter(name).data = weight
    packed.scales[3, 0] *= 1.5
    with pytest.raises(VerificationError) as refused:
        load_dequantized(vlm, {name: torch.from_numpy(unpack(packed))}, "onnx", "int4")
    line = str(refused.value)
    assert "stage 'first_logits', kind quantization: the onnx files do not hold the checkpoint's weights" in line
    assert f"'{name}' is off by up to" in line and "in row 3" in line and "1 groups so" in line


def test_other_shapes_and_values_that_are_no_numbers() -> None:
    vlm = random_vlm()
    weight = vlm.state_dict()["projector.linear_1.weight"]
    with pytest.raises(VerificationError, match=r"stage 'visual_tokens'.*has shape \[2, 2\], not"):
        load_dequantized(vlm, {"projector.linear_1.weight": torch.zeros(2, 2)}, "onnx", "int4")
    spoilt = weight.clone()
    spoilt[1, 1] = float("nan")
    with pytest.raises(VerificationError, match="in row 1,"):
        load_dequantized(vlm, {"projector.linear_1.weight": spoilt}, "onnx", "int4")
