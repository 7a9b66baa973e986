"""Losses of single parts, their prices, and the bits that a budget buys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bundle.errors import UsageError
from bundle.manifest import Target
from distill.models.checkpoint import load_vlm
from distill.models.processing import read_processing
from export.model.streamed import open_streamed
from export.quantize.blame import Blame, blame_rows, blame_table
from export.quantize.budget import MB, choose_bits, price_bytes, weight_bytes
from export.quantize.calibration import CalibrationData, Conversation, read_calibration
from export.quantize.parts import Part, parts_of, recipe_of
from export.quantize.sensitivity import WIDTHS, Loss, RoundedPart, Sensitivity, answer_numbers, compare
from export.weights.recipe import RECIPES, Bits, storage_of
from tests.export.conftest import STUDENT
from tests.export.quantize.calibration_set import write_set

SHAPES: dict[str, tuple[int, ...]] = {
    "language_model.layers.0.self_attn.q_proj.weight": (64, 64),
    "language_model.layers.0.mlp.down_proj.weight": (64, 128),
    "language_model.layers.0.input_layernorm.weight": (64,),
    "lm_head.weight": (512, 64),
}
NAMES = ("decoder layer 0 attention", "decoder layer 0 mlp", "head")


def parts() -> list[Part]:
    return parts_of(SHAPES, tower_layers=0, decoder_layers=1)


def losses(**four: float) -> dict[str, dict[Bits, Loss]]:
    found = dict(zip(NAMES, four.values(), strict=True))
    return {name: {4: Loss(kl=kl, flips_percent=0), 8: Loss(kl=0.001, flips_percent=0)} for name, kl in found.items()}


def test_parts_cover_what_int8_quantizes_and_give_it_back_as_rules() -> None:
    vlm = load_vlm(STUDENT)
    shapes = {name: tuple(weight.shape) for name, weight in vlm.state_dict().items()}
    found = parts_of(shapes, vlm.config.tower_layers, len(vlm.language_model.layers))
    names = [name for part in found for name in part.weights]
    unread = [f"vision_tower.encoder.layers.{number}." for number in range(vlm.config.tower_layers, 99)]
    read = {name for name in shapes if not name.startswith(tuple(unread))}
    assert sorted(names) == sorted(name for name in read if storage_of(name, shapes[name], "int8").bits == 8)
    assert [part.layer for part in found if part.layer is not None] == sorted(
        part.layer for part in found if part.layer is not None
    )
    for part in found:
        recipe = recipe_of("one", [(part, 4)])
        fours = {name for name, shape in shapes.items() if storage_of(name, shape, recipe).bits == 4}
        assert fours == set(part.weights), part.name


def test_known_losses() -> None:
    wanted = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]]).log()
    found = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.5, 0.1]]).log()
    loss = compare(found, wanted, torch.tensor([0, 0, 1]))
    assert loss.kl == pytest.approx((0.5 * torch.tensor(5 / 4).log() + 0.4 * torch.tensor(4 / 5).log()).item() / 3)
    assert loss.flips_percent == 50  # one of two answers
    assert compare(wanted + 3, wanted, torch.tensor([0, 0, 1])).kl < 1e-6  # of logits, the shift means nothing


def test_answers_are_numbered_by_their_gaps() -> None:
    rows = [torch.tensor([4, 5, 9]), torch.tensor([10, 11])]
    assert answer_numbers([Conversation((), None, one) for one in rows]).tolist() == [0, 0, 1, 2, 2]


@torch.no_grad()
def test_a_part_is_measured_alone_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, config = open_streamed(STUDENT), load_vlm(STUDENT).config
    data = read_calibration(CalibrationData(write_set(tmp_path, 3)), read_processing(STUDENT), config, 512)
    shapes = {name: tuple(weight.shape) for name, weight in model.vlm.state_dict().items()}
    found = parts_of(shapes, config.tower_layers, len(model.vlm.language_model.layers))
    sensitivity = Sensitivity(model, data.conversations)
    measured = sensitivity.measure(found, lambda line: None)
    assert set(measured) == {part.name for part in found}
    assert all(of[4].kl > of[8].kl >= 0 for of in measured.values())
    part = found[-2]  # from states half way up: the same as from the beginning
    whole = sensitivity.of_weights(RoundedPart(model.weights, {name: WIDTHS[4] for name in part.weights}))
    assert whole.kl == pytest.approx(measured[part.name][4].kl, rel=1e-3)
    assert sensitivity.of_weights({}) == Loss(kl=0, flips_percent=0)


@pytest.mark.parametrize("target,scale", [("onnx", 4), ("executorch", 2), ("coreml", 2)])
def test_prices(target: Target, scale: int) -> None:
    attention = parts()[0]
    blocks = 64 * 64 // 128 if target == "onnx" else 64  # scales at 8 bits
    assert price_bytes(attention, SHAPES, target) == 64 * 64 // 2 + scale * (blocks - 64 * 64 // 32)


def bits_for(budget: int, **four: float) -> list[int]:
    return list(choose_bits(parts(), losses(**four), SHAPES, "coreml", budget).values())


def test_megabytes_go_where_they_buy_most() -> None:
    every = weight_bytes(SHAPES, recipe_of("", [(part, 4) for part in parts()]), "coreml")
    attention, mlp, head = (price_bytes(part, SHAPES, "coreml") for part in parts())
    assert attention < mlp < head
    assert bits_for(every, attention=0.1, mlp=0.1, head=0.1) == [4, 4, 4]
    assert bits_for(every + attention, attention=0.1, mlp=0.1, head=0.1) == [8, 4, 4]
    assert bits_for(every + head, attention=0.1, mlp=0.1, head=9.0) == [4, 4, 8]
    assert bits_for(every + head - 1, attention=0.1, mlp=0.1, head=9.0) == [8, 8, 4], "what does not fit is passed over"
    assert bits_for(10 * every, attention=0.1, mlp=0.0005, head=0.1) == [8, 4, 8], "8 bits that gain nothing"


def test_a_budget_below_the_least() -> None:
    with pytest.raises(UsageError, match=r"--budget-mb 0.01 is too little: .* the weights are 0.03 MB; give at least"):
        bits_for(10_000, attention=1, mlp=1, head=1)


def test_executorch_keeps_its_table_at_8_bits() -> None:
    shapes = SHAPES | {"language_model.embed_tokens.weight": (512, 64)}
    found = parts_of(shapes, 0, 1)
    loss = {part.name: {4: Loss(kl=1, flips_percent=0), 8: Loss(kl=0, flips_percent=0)} for part in found}
    table = next(part for part in found if part.name == "embedding")
    least = weight_bytes(shapes, recipe_of("", [(p, 8 if p is table else 4) for p in found]), "executorch")
    assert choose_bits(found, loss, shapes, "executorch", least)["embedding"] == 8
    assert choose_bits(found, loss, shapes, "onnx", least)["embedding"] == 4


def test_the_table_has_the_worst_first() -> None:
    loss = losses(attention=0.1, mlp=0.3, head=0.2)
    rows = blame_rows(parts(), loss, dict.fromkeys(NAMES, 4), SHAPES, "onnx")
    assert [row.part for row in rows] == [NAMES[1], NAMES[2], NAMES[0]]
    assert rows[0].fix_mb == price_bytes(parts()[1], SHAPES, "onnx") / MB
    blame = Blame(rows=rows, together=Loss(kl=0.5, flips_percent=12), weights_mb=0.05, budget_mb=1)
    assert blame_table(blame).row_count == 3
    assert Blame.model_validate_json(blame.model_dump_json()) == blame


def test_int8_recipe_is_what_a_chosen_recipe_falls_back_to() -> None:
    assert recipe_of("auto", [(part, 8) for part in parts()]).rules == RECIPES["int8"].rules
