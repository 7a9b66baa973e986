"""Recipes: YAML as defaults, flags win, mistakes are one line; the committed ones hold the paper's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from bundle.errors import UsageError
from distill.settings.recipe import with_recipe
from distill.settings.training import DistillConfig
from distill.training.model_card import recipe_text

RECIPES = Path(__file__).parents[2] / "recipes"
NEEDED = ["--student", "s", "--data", "d.json", "--output", "o", "--teacher", "t"]


def parse(*words: object) -> DistillConfig:
    return tyro.cli(DistillConfig, args=with_recipe(list(map(str, words))))


@pytest.mark.parametrize(
    ("name", "rates", "template", "rows"),
    [("pretrain", (2e-5, 1e-3), "plain", 256), ("finetune", (4e-5, None), "v1", 128)],
)
def test_the_stages_are_the_papers(name: str, rates: tuple[float, float | None], template: str, rows: int) -> None:
    config = parse("--recipe", RECIPES / f"mobilevlm_v2_{name}.yaml", *NEEDED)
    assert (config.learning_rate, config.projector_learning_rate) == rates
    assert config.template == template and config.image_strategy == "pad" and config.losses == "paper"
    assert config.batch_size * config.gradient_accumulation * 8 == rows
    assert (config.epochs, config.schedule, config.warmup, config.weight_decay) == (1, "cosine", 0.03, 0)
    assert config.freeze_tower and config.temperature == 1 and config.top_k == 16 and config.max_steps is None


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_committed_recipe_is_valid(recipe: Path) -> None:
    assert parse("--recipe", recipe, *NEEDED).student == Path("s")


def test_flags_win_over_the_recipe_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "learning_rate: 1e-3\nbf16: true\nweights:\n  attention: 0\nlora: {rank: 8, targets: [q_proj, v_proj]}\n"
        "max_steps: null\nstudent: elsewhere\n"
    )
    config = parse("--learning-rate", "0.5", "--recipe", file, *NEEDED, "--no-bf16")
    assert config.learning_rate == 0.5 and not config.bf16 and config.student == Path("s")
    assert config.weights.attention == 0 and config.lora.rank == 8 and config.lora.targets == ("q_proj", "v_proj")
    assert parse(f"--recipe={file}", *NEEDED).bf16


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rat: 1", ("learning_rat is no setting", "learning_rate")),
        ("learning_rate: fast", ("learning_rate is 'fast'", "valid number")),
        ("batch_size: 1.5", ("batch_size is 1.5", "integer")),
        ("losses: best", ("losses is 'best'", "'paper'")),
        ("weights: 3", ("weights holds 3", "indented")),
        ("weights: {focus: [1]}", ("weights.focus is [1]",)),
        ("lora: {ranks: 3}", ("lora.ranks is no setting", "rank, alpha")),
        ("resume: true", ("resume is no setting",)),
        ("- 1", ("holds list",)),
        ("a: [", ("is not YAML",)),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        with_recipe(["--recipe", str(file)])
    assert str(file) in str(raised.value) and [part for part in parts if part not in str(raised.value)] == []


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.yaml does not exist"):
        with_recipe(["--recipe", str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match="--recipe needs a YAML file"):
        with_recipe(["--recipe"])


def test_the_settings_in_a_card_are_a_recipe(tmp_path: Path) -> None:
    config = parse(*NEEDED, "--learning-rate", 3e-4, "--lora.rank", 4, "--weights.focus", 0.5, "--max-steps", 7)
    file = tmp_path / "card.yaml"
    file.write_text(recipe_text(config))
    assert parse("--recipe", file) == config
