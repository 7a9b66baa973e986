"""export.weights.dequantized: the weights that files hold against the checkpoint's, by a rule that knows no packing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from bundle.errors import VerificationError
from export.contract import OnnxOptions
from export.model.graph_weights import EMBEDDING
from export.model.streamed import LoadedModel
from export.weights.blocks import pack, unpack
from export.weights.dequantized import CHUNK_VALUES, RoundedWeights, check_stored, rounded
from export.weights.lazy import LazyWeights
from export.weights.plan import StoragePlan
from export.weights.recipe import RECIPES, Storage
from tests.export.models import random_vlm

UP = "language_model.layers.0.mlp.up_proj.weight"
INT4 = StoragePlan("onnx", "int4")


def test_rounding_known_answers() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert rounded(weight, Storage(4, None)).tolist() == [[7.0, -3.0, 1.0, 0.0], [0.0] * 4]
    assert rounded(weight, Storage(4, 2)).tolist()[0] == pytest.approx([7.0, -3.0, 0.6, 0.0])
    assert torch.equal(rounded(weight, Storage(32, None)), weight)
    assert float(rounded(torch.tensor([1 + 2.0**-12]), Storage(16, None))) == 1.0


def test_what_a_target_stores_otherwise_than_the_recipe() -> None:
    onnx, head4 = StoragePlan("onnx", "int4"), StoragePlan("onnx", "int4", recipe=RECIPES["int4-head4"])
    for name in ("lm_head.weight", UP, EMBEDDING):
        assert StoragePlan("executorch", "int4").storage(name, (512, 64)) == onnx.storage(name, (512, 64))
    assert onnx.storage("lm_head.weight", (512, 64)) == Storage(8, None)
    assert head4.storage("lm_head.weight", (512, 64)) == Storage(4, 32)
    assert head4.storage("lm_head.weight", (512, 80)) == Storage(8, None), "32 does not divide"
    norm = "language_model.norm.weight"
    assert StoragePlan("coreml", "int4").storage(norm, (64,)) == Storage(16, None)
    assert onnx.storage(norm, (64,)) == StoragePlan("coreml", "fp32").storage(norm, (64,)) == Storage(32, None)
    asked = StoragePlan("onnx", "int4", OnnxOptions(int4_embedding=True).storages)
    assert asked.storage(EMBEDDING, (512, 64)) == Storage(4, 32) != onnx.storage(EMBEDDING, (512, 64))
    assert asked.storage("lm_head.weight", (512, 64)) == Storage(8, None)


@torch.no_grad()
def test_rounded_weights_are_used_and_let_go() -> None:
    vlm = random_vlm()
    before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
    ids = torch.tensor([[1, 5, 9, 3]])
    exact = vlm.logits(ids)
    model = LoadedModel(vlm, vlm.state_dict())
    plan = StoragePlan("onnx", "int4")
    model.use(RoundedWeights(model.weights, plan))
    four = vlm.logits(ids)
    model.use(RoundedWeights(model.weights, StoragePlan("onnx", "int8")))
    eight = vlm.logits(ids)
    model.use({})
    assert float((four - exact).norm()) > 5 * float((eight - exact).norm()) > 0
    assert torch.equal(vlm.logits(ids), exact)
    assert all(torch.equal(weight, before[name]) for name, weight in vlm.state_dict().items())
    weights = RoundedWeights(before, plan)
    for name, weight in before.items():
        out = torch.empty(weight.shape)
        weights.read_into(name, out)
        assert torch.equal(out, rounded(weight, plan.storage(name, tuple(weight.shape)))), name
        assert torch.equal(out, weights[name])
    assert weights[UP].unique().numel() < before[UP].unique().numel(), "the reference really rounds"


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
def test_our_packer_stays_within_the_limit_and_a_wrong_scale_does_not(bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    name = UP if bits == 4 else "lm_head.weight"
    weight = torch.randn((96, 128), generator=generator) * torch.logspace(-3, 0, 128)
    packed = pack(weight.numpy(), bits, group)
    check_stored({name: weight}, {name: torch.from_numpy(unpack(packed))}, INT4)

    packed.scales[3, 0] *= 1.5
    line = refusal({name: weight}, {name: torch.from_numpy(unpack(packed))})
    assert "stage 'first_logits', kind quantization: the onnx files do not hold the checkpoint's weights" in line
    assert f"'{name}' is off by up to" in line and "in row 3" in line and "1 groups so" in line


def test_a_width_that_the_group_does_not_divide() -> None:
    weight = torch.randn((8, 48), generator=torch.Generator().manual_seed(0))
    plan = StoragePlan("onnx", "int4", {UP: Storage(4, 32)})
    stored = torch.from_numpy(unpack(pack(weight.numpy(), 4, 32)))
    check_stored({UP: weight}, {UP: stored}, plan)
    assert rounded(weight, Storage(4, 32)).shape == (8, 48)
    stored[7, 40] += 1
    with pytest.raises(VerificationError, match="in row 7, group 1 of 32 values"):
        check_stored({UP: weight}, {UP: stored}, plan)


class Lazy(LazyWeights):
    """Weights that can only be written into a given tensor; counts the tensors that were given."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.given: set[int] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is read into new memory")

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self.given.add(out.data_ptr())
        out.copy_(self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_large_lazy_weights_are_compared_in_pieces_in_memory_that_is_used_again() -> None:
    rows = CHUNK_VALUES // 128 + 100  # more than one piece
    half = torch.randn((rows, 128), generator=torch.Generator().manual_seed(0)).half()
    names = [f"language_model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    stored = Lazy({name: rounded(half.float(), Storage(4, 32)) for name in names})
    weights = dict.fromkeys(names, half)
    check_stored(weights, stored, INT4)
    assert len(stored.given) == 1 and UP in stored and "lm_head.weight" not in stored
    stored.weights[names[1]][rows - 2, 33] += 5
    stored.weights[names[1]][rows - 1, 127] = float("nan")
    line = refusal(weights, stored)
    assert f"'{names[1]}'" in line and f"in row {rows - 2}, group 1 of 32 values" in line and "(2 groups so;" in line


def test_other_shapes_and_values_that_are_no_numbers() -> None:
    name = "projector.linear_1.weight"
    weight = random_vlm().state_dict()[name]
    line = refusal({name: weight}, {name: torch.zeros(2, 2)})
    assert "stage 'visual_tokens'" in line and "has shape [2, 2], not" in line
    spoilt = weight.clone()
    spoilt[1, 1] = float("nan")
    assert "in row 1," in refusal({name: weight}, {name: spoilt})


def refusal(weights: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> str:
    with pytest.raises(VerificationError) as refused:
        check_stored(weights, stored, INT4)
    return str(refused.value)
