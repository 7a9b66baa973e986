"""The recipes as policy: which weight gets how many bits."""

from __future__ import annotations

import pytest

from bundle.manifest import Precision
from distill.models.checkpoint import load_vlm
from export.weights.recipe import RECIPES, Storage, fallbacks, rule_of, storage_of
from tests.export.conftest import STUDENT

SHAPES: dict[str, tuple[int, ...]] = {
    "language_model.layers.0.self_attn.q_proj.weight": (64, 64),
    "language_model.layers.11.mlp.down_proj.weight": (64, 128),
    "lm_head.weight": (512, 64),
    "language_model.embed_tokens.weight": (512, 64),
    "vision_tower.encoder.layers.1.self_attn.out_proj.weight": (32, 32),
    "vision_tower.encoder.layers.1.mlp.fc1.weight": (64, 32),
    "projector.linear_2.weight": (64, 64),
    "projector.position.weight": (64, 1, 3, 3),
    "vision_tower.embeddings.patch_embedding.weight": (32, 3, 14, 14),
    "language_model.layers.0.input_layernorm.weight": (64,),
    "vision_tower.embeddings.position_embedding.weight": (577, 32),
    "vision_tower.encoder.layers.1.mlp.fc1.bias": (64,),
}
BITS: dict[Precision, tuple[int, ...]] = {
    "int4": (4, 4, 8, 8, 8, 8, 8, 32, 32, 32, 32, 32),
    "int8": (8, 8, 8, 8, 8, 8, 8, 32, 32, 32, 32, 32),
    "fp16": (16, 16, 16, 16, 16, 16, 16, 16, 16, 32, 32, 32),
    "fp32": (32,) * 12,
}


@pytest.mark.parametrize("precision", BITS)
def test_every_kind_of_weight_has_its_bits(precision: Precision) -> None:
    assert tuple(storage_of(name, shape, precision).bits for name, shape in SHAPES.items()) == BITS[precision]


def test_int4_comes_in_groups_and_int8_per_channel() -> None:
    assert storage_of("language_model.layers.3.mlp.up_proj.weight", (5632, 2048), "int4") == Storage(4, 32)
    assert storage_of("lm_head.weight", (32000, 2048), "int4") == Storage(8, None)


def test_head4_is_int4_but_for_the_head() -> None:
    head4, int4 = RECIPES["int4-head4"], RECIPES["int4"]
    changed = {
        name for name, shape in SHAPES.items() if storage_of(name, shape, head4) != storage_of(name, shape, int4)
    }
    assert changed == {"lm_head.weight"}
    assert storage_of("lm_head.weight", (512, 64), head4) == Storage(4, 32)


def test_g128_is_int4_but_for_the_groups_of_the_decoder() -> None:
    up, narrow = "language_model.layers.0.mlp.up_proj.weight", (5632, 96)
    assert storage_of(up, (5632, 2048), RECIPES["int4-g128"]) == Storage(4, 128)
    assert storage_of(up, narrow, RECIPES["int4-g128"]) == Storage(8, None)
    assert storage_of("lm_head.weight", (512, 128), RECIPES["int4-g128"]) == Storage(8, None)


def test_a_width_that_the_group_does_not_divide_falls_back_and_is_listed() -> None:
    name = "language_model.layers.0.self_attn.o_proj.weight"
    assert storage_of(name, (80, 80), "int4") == Storage(8, None)
    assert fallbacks({name: (80, 80), "lm_head.weight": (48, 80)}, "int4") == [name]
    assert fallbacks({name: (80, 96)}, "int4") == []


def test_the_first_rule_wins_and_the_last_takes_everything() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.rules[-1].pattern == ".*"
        assert rule_of("something.else", recipe) is recipe.rules[-1]


def test_int4_covers_nearly_all_bytes_of_the_decoder_of_a_real_checkpoint() -> None:
    sizes = {name: tuple(weight.shape) for name, weight in load_vlm(STUDENT).state_dict().items()}
    decoder = {name: shape for name, shape in sizes.items() if name.startswith("language_model.layers")}
    wide = [name for name, shape in decoder.items() if len(shape) == 2]
    assert len(wide) == 2 * 7
    assert all(storage_of(name, decoder[name], "int4").bits == 4 for name in wide)
