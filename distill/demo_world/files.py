"""What the writers of the six benchmarks share: pictures, JSON, a scene that a family has a question on."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.demo_world.question import Asker, Question
from distill.demo_world.scene import SEEN_PAIRS, Scene, make_scene

JPEG_QUALITY = 95


def save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a JPEG, or a PNG where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(png_bytes(pixels))
    else:
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY, subsampling=0)


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def ask(
    rng: random.Random, asker: Asker, wanted: Callable[[Question], bool] = lambda question: True
) -> tuple[Scene, Question]:
    """A scene on which ``asker`` has a question, and the question."""
    while True:
        scene = make_scene(rng, SEEN_PAIRS)
        asked = asker(scene, rng)
        if asked is not None and wanted(asked):
            return scene, asked


def loader_line(question_id: str | int, image: str, asked: Question) -> dict[str, object]:
    return {"question_id": question_id, "image": image, "text": asked.prompt, "category": "default"}


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
