"""Model and processing -> golden cases and vectors: what each stage computes on four built-in questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bundle.golden import GoldenCase, Vector
from bundle.image import preprocess
from bundle.manifest import Stage
from bundle.prompt import Prompt, build_prompt
from bundle.replay import relative_error
from bundle.tokenizer import Tokenizer
from distill.models.processing import Processing

Floats = NDArray[np.float32]

# Width and height are odd, wide, tall and tiny on purpose: padding and resizing take every branch.
PICTURES: dict[str, tuple[int, int]] = {"wide": (131, 57), "tall": (45, 98), "tiny": (7, 5)}
QUESTIONS: dict[str, str] = {
    "wide": "What colour is the circle?",
    "tall": "How many shapes are there?\nAnswer the question using a single word or phrase.",
    "tiny": "Is there a red square in the image? Answer yes or no.",
    "text_only": "What is the capital of France?",
}
SHAPES = 4


@dataclass(frozen=True)
class Probe:
    """One golden question before the model has seen it."""

    name: str
    question: str
    prompt: Prompt
    image: Image.Image | None
    pixels: Floats | None  # [1, 3, S, S]

    @property
    def image_file(self) -> str | None:
        """Where the picture lies inside the bundle."""
        return None if self.image is None else f"golden/{self.name}.png"


@dataclass(frozen=True)
class Outputs:
    """What the model computes for a probe, stage by stage, and the ids it was fed while decoding."""

    visual_tokens: Floats | None  # [1, N, D]
    embeddings: Floats  # [1, T, D]
    greedy_logits: Floats  # [32, V], row 0 after the prompt
    fed_ids: tuple[int, ...]

    @property
    def first_logits(self) -> Floats:
        """[V], after the prompt."""
        return self.greedy_logits[0]


def picture(name: str) -> Image.Image:
    """A seeded picture: a noisy colour slope with a few shapes, so that resampling errors show."""
    width, height = PICTURES[name]
    random = np.random.default_rng(sorted(PICTURES).index(name))
    slope = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = random.integers(0, 32, (height, width, 3))
    image = Image.fromarray((slope + noise).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in range(SHAPES):
        left, top = int(random.integers(0, width)), int(random.integers(0, height))
        box = (left, top, left + width // 3, top + height // 3)
        red, green, blue = (int(value) for value in random.integers(0, 256, 3))
        (draw.ellipse if shape % 2 else draw.rectangle)(box, fill=(red, green, blue))
    return image


def probes(processing: Processing, tokenizer: Tokenizer) -> list[Probe]:
    """The built-in questions in the checkpoint's own template."""

    def probe(name: str, question: str) -> Probe:
        image = picture(name) if name in PICTURES else None
        prompt = build_prompt(processing.prompt, tokenizer, processing.tokenizer, question, image is not None)
        return Probe(name, question, prompt, image, None if image is None else preprocess(image, processing.image))

    return [probe(name, question) for name, question in QUESTIONS.items()]


def golden_case(probe: Probe, outputs: Outputs) -> GoldenCase:
    """The case's row in cases.json."""
    return GoldenCase(
        name=probe.name,
        image=probe.image_file,
        question=probe.question,
        prompt_text=probe.prompt.text,
        token_ids=probe.prompt.token_ids,
        greedy_ids=outputs.fed_ids,
    )


def golden_vectors(probe: Probe, outputs: Outputs) -> Iterator[tuple[str, Floats]]:
    """The case's named vectors."""
    found: dict[Vector, Floats | None] = {
        "pixels": probe.pixels,
        "visual_tokens": outputs.visual_tokens,
        "embeddings": outputs.embeddings,
        "first_logits": outputs.first_logits,
        "greedy_logits": outputs.greedy_logits,
    }
    for name, values in found.items():
        if values is not None:
            yield f"{probe.name}.{name}", values


def worst_errors(found: Iterable[Outputs], wanted: Iterable[Outputs]) -> dict[Stage, float]:
    """The worst relative L2 error of each stage over all questions."""
    worst: dict[Stage, float] = {}
    for mine, theirs in zip(found, wanted, strict=True):
        for stage, error in _errors(mine, theirs):
            worst[stage] = max(worst.get(stage, 0.0), error)
    return worst


def _errors(found: Outputs, wanted: Outputs) -> Iterator[tuple[Stage, float]]:
    if found.visual_tokens is not None and wanted.visual_tokens is not None:
        yield "visual_tokens", relative_error(found.visual_tokens, wanted.visual_tokens)
    yield "embeddings", relative_error(found.embeddings, wanted.embeddings)
    yield "first_logits", relative_error(found.first_logits, wanted.first_logits)
    yield "greedy_tokens", max(map(relative_error, found.greedy_logits, wanted.greedy_logits))
