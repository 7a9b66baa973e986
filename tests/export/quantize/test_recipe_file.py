"""Recipes from files, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundle.errors import UsageError
from bundle.manifest import Target
from export.quantize.recipe_file import check_recipe, find_recipe
from export.weights.recipe import RECIPES, Storage, storage_of

NAMES = [f"language_model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
SHAPES: dict[str, tuple[int, ...]] = {name: (64, 64) for name in NAMES} | {
    "lm_head.weight": (512, 64),
    "language_model.embed_tokens.weight": (512, 64),
    "language_model.norm.weight": (64,),
    "vision_tower.embeddings.patch_embedding.weight": (32, 3, 14, 14),
}
RECIPE = """
name: careful
rules:
  - {pattern: '.*\\.o_proj\\.weight', bits: 8}
  - {pattern: 'lm_head\\.weight', bits: 4, group_size: 64}
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_files_rules_come_before_its_precisions(tmp_path: Path) -> None:
    recipe = find_recipe(written(tmp_path, RECIPE))
    found = {name: storage_of(name, shape, recipe) for name, shape in SHAPES.items()}
    assert (recipe.name, recipe.precision) == ("careful", "int4")
    assert found[NAMES[3]] == Storage(8, None) and found["lm_head.weight"] == Storage(4, 64)
    assert found[NAMES[0]] == Storage(4, 32) and found["language_model.norm.weight"] == Storage(32, None)
    check_recipe(recipe, SHAPES, "onnx")


def test_json_is_read_too_and_names_are_ours(tmp_path: Path) -> None:
    text = json.dumps({"name": "j", "precision": "int8", "rules": [{"pattern": "lm_head.weight", "bits": 4}]})
    recipe = find_recipe(written(tmp_path, text))
    assert recipe.precision == "int8" and storage_of("lm_head.weight", (512, 64), recipe) == Storage(4, 32)
    assert find_recipe("int4-head4") is RECIPES["int4-head4"]


@pytest.mark.parametrize(
    "text,says",
    [
        ("name: [", "neither YAML nor JSON"),
        ("just words", "(top level)"),
        ("name: x\nrules: []", "'rules'"),
        ("name: x\nrules: [{pattern: '(', bits: 4}]", "is no regular expression"),
        ("name: x\nrules: [{pattern: a, bits: 5}]", "'rules.0.bits'"),
        ("name: x\nrules: [{pattern: a, bits: 4, group: 32}]", "'rules.0.group'"),
        ("name: x\nprecision: fp16\nrules: [{pattern: a, bits: 4}]", "'precision'"),
        ("name: a/b\nrules: [{pattern: a, bits: 4}]", "'name'"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_recipe(written(tmp_path, text))
    assert says in str(caught.value) and "recipe.yaml" in str(caught.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'nothing' is no file and no recipe of ours; .*'auto'.*int4-head4"):
        find_recipe("nothing")


@pytest.mark.parametrize(
    "rule,target,says",
    [
        ("{pattern: nothing, bits: 4}", "onnx", "no weight of the model matches 'nothing'"),
        (r"{pattern: '.*norm\.weight', bits: 8}", "onnx", "'language_model.norm.weight' at 8 bits; only matrices"),
        (r"{pattern: '.*patch_.*', bits: 8}", "onnx", "patch_embedding.weight' at 8 bits; only matrices"),
        (r"{pattern: '.*embed_tokens\.weight', bits: 4}", "executorch", "--target executorch takes it at 8 bits only"),
        (r"{pattern: '.*\.q_proj\.weight', bits: 8}", "onnx", "give them one rule"),
    ],
)
def test_what_no_packer_does_is_refused(tmp_path: Path, rule: str, target: Target, says: str) -> None:
    recipe = find_recipe(written(tmp_path, f"name: x\nrules: [{rule}]"))
    with pytest.raises(UsageError) as caught:
        check_recipe(recipe, SHAPES, target)
    assert says in str(caught.value)
