"""Projectors: shapes, and the layouts of LDP v1 and LLaVA's MLPs against modules of the published structure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bundle.errors import UsageError
from distill.models import load_vlm
from distill.models.create import create_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.models.projector import make_projector, visual_tokens
from distill.models.save import save_checkpoint

WIDTH, HIDDEN = 12, 24


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a plane."""

    def forward(self, plane: torch.Tensor) -> torch.Tensor:
        return super().forward(plane.transpose(1, 3)).transpose(1, 3)


class Gate(nn.Module):
    """Squeeze and excitation with the published names."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, plane: torch.Tensor) -> torch.Tensor:
        scale = self.fc2(torch.relu(self.fc1(nn.functional.adaptive_avg_pool2d(plane, 1))))
        return plane * (scale + 3).clamp(0, 6) / 6


class PublishedBlock(nn.Module):
    """A MobileNetV3 block under the name ``block``."""

    def __init__(self, channels: int, squeezed: int, stride: int) -> None:
        super().__init__()
        spread = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            ChannelNorm(channels),
            nn.Hardswish(),
        )
        narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), ChannelNorm(channels))
        self.block, self.residual = nn.Sequential(spread, Gate(channels, squeezed), narrow), stride == 1

    def forward(self, plane: torch.Tensor) -> torch.Tensor:
        return self.block(plane) + (plane if self.residual else 0)


class PublishedLDPv1(nn.Module):
    """The projector of MobileVLM V1 with the names of its files."""

    def __init__(self, width: int, hidden: int, squeezed: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.mlp = nn.Sequential(nn.Identity(), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        blocks = (PublishedBlock(hidden, squeezed, stride) for stride in (1, 2))
        self.model.mb_block = nn.Sequential(nn.Identity(), *blocks)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.model.mlp(features)
        grid = int(features.shape[1] ** 0.5)
        return self.model.mb_block(hidden.mT.unflatten(2, (grid, grid))).flatten(2).mT


def published(name: str, width: int, hidden: int) -> nn.Module:
    squeezed = {24: 8, 64: 16, 32: 8}[hidden]
    return {
        "ldpnet": lambda: PublishedLDPv1(width, hidden, squeezed),
        "linear": lambda: nn.Linear(width, hidden),
        "mlp2x_gelu": lambda: nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)),
    }[name]()


@pytest.mark.parametrize(("name", "grid", "tokens"), [
    ("ldpnetv2", 6, 9), ("ldpnet", 6, 9), ("ldpnet", 5, 9), ("linear", 6, 36), ("mlp2x_gelu", 6, 36),
    ("mlp3x_gelu", 6, 36),
])  # fmt: skip
def test_number_of_tokens(name: str, grid: int, tokens: int) -> None:
    made = make_projector(name, WIDTH, HIDDEN, grid)(torch.randn(2, grid**2, WIDTH))
    assert made.shape == (2, tokens, HIDDEN) and visual_tokens(name, grid) == tokens


@pytest.mark.parametrize("name", ["ldpnet", "linear", "mlp2x_gelu"])
def test_published_layout_gives_the_published_tokens(name: str, reference: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for folder in ("student", "clip-tiny"):
        shutil.copytree(reference / folder, tmp_path / folder)
    config_path, weights_path = tmp_path / "student/config.json", tmp_path / "student/model.safetensors"
    config = json.loads(config_path.read_text())
    theirs = published(name, config["mm_hidden_size"], config["hidden_size"]).eval()
    config_path.write_text(json.dumps(config | {"mm_projector_type": name}))
    kept = {k: v for k, v in load_file(weights_path).items() if "mm_projector" not in k}
    added = {f"model.mm_projector.{k}": v.clone() for k, v in theirs.state_dict().items()}
    save_file(kept | added, weights_path)
    vlm = load_vlm(tmp_path / "student")
    features = torch.randn(2, vlm.config.patch_grid**2, config["mm_hidden_size"])
    with torch.no_grad():
        torch.testing.assert_close(vlm.projector(features), theirs(features), atol=1e-5, rtol=1e-5)
    save_checkpoint(vlm, tmp_path / "ours", read_processing(tmp_path / "student"))
    again = load_vlm(tmp_path / "ours")
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        assert torch.equal(again.encode_images(pixels), vlm.encode_images(pixels))
    assert again.encode_images(pixels).shape[1] == again.config.visual_tokens


def test_unknown_projector_is_named_with_the_known_ones(reference: Path, tmp_path: Path) -> None:
    for folder in ("student", "clip-tiny"):
        shutil.copytree(reference / folder, tmp_path / folder)
    path = tmp_path / "student/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_projector_type": "qformer"}))
    with pytest.raises(UsageError, match="'qformer' is not supported; supported: ldpnetv2, ldpnet, linear"):
        load_vlm(tmp_path / "student")


def test_a_new_student_takes_its_likes_projector(student: MobileVlm) -> None:
    student.config.projector_type = "mlp2x_gelu"
    made = create_vlm(student.config.text_config, student.vision_tower, student.config)
    assert made.config.visual_tokens == made.config.patch_grid**2 == 576
