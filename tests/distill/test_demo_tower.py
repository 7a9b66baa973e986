"""The demo tower's lessons: labels say what a cell holds, wanted features say it back, training lowers the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from distill.demo_world.scene import BACKGROUNDS, COLOURS, LEXICON, SHAPES, Scene, Thing
from distill.demo_world.tower import (
    LABELS,
    NOTHING,
    LabelledScenes,
    TowerPretraining,
    cell_labels,
    pretrain_tower,
    read_accuracy,
    to_patches,
)


@pytest.fixture
def config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=16,
        image_size=96,
        projection_dim=64,
    )


def test_labels_of_a_known_scene() -> None:
    labels = cell_labels(Scene((Thing(2, "green", "star"),), "BUS", 7, "bright"))
    assert labels.shape == (9, len(LABELS))
    bright = BACKGROUNDS.index("bright")
    assert labels[2].tolist() == [list(COLOURS).index("green"), SHAPES.index("star"), NOTHING["word"], bright, 2]
    assert labels[7].tolist() == [NOTHING["colour"], NOTHING["shape"], LEXICON.index("BUS"), bright, 7]


def test_patches_repeat_their_cell() -> None:
    patches = to_patches(torch.arange(9)[None, :, None]).view(6, 6)
    assert patches[:2, :2].unique().tolist() == [0] and patches[4:, 2:4].unique().tolist() == [7]


def test_wanted_features_are_read_back_and_have_unit_variance(config: CLIPVisionConfig) -> None:
    module = TowerPretraining(config, seed=1)
    labels = to_patches(torch.from_numpy(LabelledScenes(50, "codes").labels))
    wanted = module.wanted(labels)
    read = module.read(wanted)
    assert all((read[name].argmax(-1) == labels[..., i]).all() for i, name in enumerate(LABELS))
    assert wanted.square().mean().item() == pytest.approx(1.0, abs=0.01)


def test_training_teaches_and_repeats(config: CLIPVisionConfig, tmp_path: Path) -> None:
    runs = [pretrain_tower(config, tmp_path, 60, 30, 16, 3e-3, seed=0) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    first, second = (tower.state_dict() for tower, _ in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    untrained = read_accuracy(TowerPretraining(config, 0).eval(), LabelledScenes(100, "fresh"))
    assert runs[0][1]["background"] > 0.9 > untrained["background"]


def test_pools_differ_by_seed_alone() -> None:
    first, again, other = (LabelledScenes(3, seed) for seed in ("a", "a", "b"))
    assert (first.pictures == again.pictures).all() and (first.pictures != other.pictures).any()
