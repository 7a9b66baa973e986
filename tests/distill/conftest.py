"""The recorded reference case, and a small LLaVA data set with and without images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bundle.image import open_image, preprocess
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"


@dataclass(frozen=True)
class Case:
    """One recorded case of the published code."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor
    recorded: dict[str, torch.Tensor]
    losses: dict[str, Any]

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "labels": self.labels,
            "pixel_values": self.pixel_values,
        }


@pytest.fixture(scope="session")
def reference() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def case() -> Case:
    recorded = load_file(REFERENCE / "outputs.safetensors")
    losses = json.loads((REFERENCE / "golden.json").read_text())["cases"]["plain_b1"]
    spec = read_processing(REFERENCE / "student").image
    images = [preprocess(open_image(REFERENCE / name), spec) for name in losses["images"]]
    ids, mask, labels = (recorded[f"plain_b1.{name}"].long() for name in ("input_ids", "attention_mask", "labels"))
    return Case(ids, mask, labels, torch.from_numpy(np.concatenate(images)), recorded, losses)


@pytest.fixture
def student() -> MobileVlm:
    return load_vlm(REFERENCE / "student")


@pytest.fixture
def teacher() -> MobileVlm:
    return load_vlm(REFERENCE / "teacher")


@pytest.fixture
def mixed(case: Case) -> dict[str, torch.Tensor]:
    """Three conversations, padded to the right: image early and long text; no image; image late and short text."""
    draw = torch.Generator().manual_seed(3)
    rows = [[1, -200, *range(30, 45)], [1, *range(60, 69)], [1, 7, 8, 9, -200, 20, 21, 22]]
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, len(row) - 3 : len(row)] = ids[i, len(row) - 3 : len(row)]
    pixels = torch.randn(2, *case.pixel_values.shape[1:], generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    """A data set of six conversations, four with an image, two of several turns; ``change`` may spoil its rows."""

    def make(change: Callable[[list[dict[str, Any]]], object] | None = None) -> Path:
        folder = tmp_path / "data"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for number in range(6):
            with_image = number not in (1, 4)
            question = "What colour is the circle?"
            talk = [
                {"from": "human", "value": f"<image>\n{question}" if with_image else question},
                {"from": "gpt", "value": ["red", "a green square", "blue"][number % 3]},
            ]
            if number in (2, 4):
                talk += [{"from": "human", "value": "How many are there?"}, {"from": "gpt", "value": "three"}]
            row: dict[str, Any] = {"id": str(number), "conversations": talk}
            if with_image:
                pixels = np.random.RandomState(number).randint(0, 255, (30, 40 + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
                row["image"] = f"images/{number}.png"
            rows.append(row)
        if change is not None:
            change(rows)
        path = folder / "train.json"
        path.write_text(json.dumps(rows))
        return path

    return make
