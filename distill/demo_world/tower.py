"""Scenes with a label for every cell -> a small CLIP tower whose patch features say what is in the patch's cell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer, TrainingArguments

from bundle.manifest import ImageSpec
from distill.demo_world.scene import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    GRID,
    IMAGE_SIZE,
    LEXICON,
    SHAPES,
    Scene,
    draw,
    make_scene,
)

SELECTED_LAYER = -2  # as in every published checkpoint; the last layer stays untrained and unused
WORD_SHARE = 0.7  # of the pictures; words are the hardest to tell apart
WORD_WEIGHT = 2.0  # extra loss weight of the cells with a word: one in thirteen
DISTANCE_WEIGHT = 4.0  # of the mean square to the wanted features, beside the cross entropies
LOGIT = 8.0
NOTHING = {"colour": len(COLOURS), "shape": len(SHAPES), "word": len(LEXICON)}
# what a cell's patches must tell, and the number of answers; "cell" keeps its place readable
LABELS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "word": len(LEXICON) + 1,
    "background": len(BACKGROUNDS),
    "cell": CELLS,
}
IMAGE = ImageSpec(
    size=IMAGE_SIZE,
    strategy="pad",
    mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's
    std=(0.26862954, 0.26130258, 0.27577711),
)


class Labelled(TypedDict):
    """One picture [96, 96, 3] uint8 and its labels [9, 5] in the order of LABELS."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]


class LabelledScenes(Dataset[Labelled]):
    """A fixed pool of pictures, drawn once."""

    def __init__(self, size: int, seed: str) -> None:
        rng = random.Random(seed)
        self.pictures = np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.labels = np.zeros((size, CELLS, len(LABELS)), np.int64)
        for number in range(size):
            scene = make_scene(rng, word=rng.random() < WORD_SHARE)
            self.pictures[number] = draw(scene, rng)
            self.labels[number] = cell_labels(scene)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Labelled:
        return {"pictures": self.pictures[index], "labels": self.labels[index]}


def cell_labels(scene: Scene) -> NDArray[np.int64]:
    """What every cell holds [9, 5]."""
    rows = []
    for cell in range(CELLS):
        thing = scene.at(cell)
        word = scene.word if scene.word_cell == cell else None
        rows.append(
            (
                NOTHING["colour"] if thing is None else list(COLOURS).index(thing.colour),
                NOTHING["shape"] if thing is None else SHAPES.index(thing.shape),
                NOTHING["word"] if word is None else LEXICON.index(word),
                BACKGROUNDS.index(scene.background),
                cell,
            )
        )
    return np.array(rows, np.int64)


class TowerPretraining(nn.Module):
    """A tower whose every patch shall say what its cell holds, as a sum of fixed orthogonal code vectors.

    A linear reader would be content with features in which shapes are faint beside colours; a decoder then finds it
    hard to look for a shape. With fixed codes of one length every label is as loud as every other, and features have
    variance 1.
    """

    codes: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: CLIPVisionConfig, seed: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        answers, draw_codes = sum(LABELS.values()), torch.Generator().manual_seed(seed)
        codes = torch.linalg.qr(torch.randn(config.hidden_size, answers, generator=draw_codes))[0].T  # [A, D]
        self.register_buffer("codes", codes * (config.hidden_size / len(LABELS)) ** 0.5, persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGE.mean) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE.std) * 255, persistent=False)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """pictures [B, 96, 96, 3] uint8 -> patch features [B, 36, D]."""
        pixels = ((pictures.float() - self.mean) / self.std).permute(0, 3, 1, 2)  # [B, 3, 96, 96]
        return self.tower(pixels, output_hidden_states=True).hidden_states[SELECTED_LAYER][:, 1:]

    def wanted(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B, 36, 5] -> features [B, 36, D] that would say just that."""
        books = self.codes.split(list(LABELS.values()))
        return torch.stack([book[labels[..., i]] for i, book in enumerate(books)]).sum(0)

    def read(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """features [B, 36, D] -> logits [B, 36, answers] for each label, the code's own share being LOGIT."""
        logits = LOGIT * features @ self.codes.T / self.codes[0].square().sum()  # [B, 36, A]
        return dict(zip(LABELS, logits.split(list(LABELS.values()), -1), strict=True))

    def forward(self, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Distance to the wanted features, and the labels' cross entropies, words counted more."""
        patches = to_patches(labels)  # [B, 36, 5]
        features = self.features(pictures)
        logits = self.read(features)
        losses = [DISTANCE_WEIGHT * F.mse_loss(features, self.wanted(patches))]
        losses += [
            F.cross_entropy(logits[name].flatten(0, 1), patches[..., i].flatten()) for i, name in enumerate(LABELS)
        ]
        word = patches[..., list(LABELS).index("word")]
        there = word != NOTHING["word"]
        losses.append(WORD_WEIGHT * F.cross_entropy(logits["word"][there], word[there]))
        return {"loss": torch.stack(losses).sum()}


def to_patches(labels: torch.Tensor) -> torch.Tensor:
    """Labels of cells [B, 9, 5] -> of their patches [B, 36, 5]."""
    grid = labels.unflatten(1, (GRID, GRID))
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)


def pretrain_tower(
    config: CLIPVisionConfig, work: Path, pool: int, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """Train a tower; return it and its accuracy per label, over patches, on new pictures."""
    torch.manual_seed(seed)
    module = TowerPretraining(config, seed)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.08,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        seed=seed,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    Trainer(model=module, args=arguments, train_dataset=LabelledScenes(pool, f"{seed} tower")).train()
    return module.tower, read_accuracy(module.eval(), LabelledScenes(1000, f"{seed} tower test"))


@torch.no_grad()
def read_accuracy(module: TowerPretraining, scenes: LabelledScenes) -> dict[str, float]:
    """Share of right labels; colour, shape and word over the patches that have one."""
    rows = [module.read(module.features(part)) for part in torch.from_numpy(scenes.pictures).split(250)]
    labels = to_patches(torch.from_numpy(scenes.labels))
    accuracy = {}
    for number, name in enumerate(LABELS):
        right = torch.cat([row[name] for row in rows]).argmax(-1) == labels[..., number]
        counted = labels[..., number] != NOTHING.get(name, -1)
        accuracy[name] = right[counted].float().mean().item()
    return accuracy
