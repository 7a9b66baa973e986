"""Demo world -> MME: question file and the fourteen categories, flat or nested as released."""

from __future__ import annotations

import random
from pathlib import Path

from distill.demo_world.files import loader_line, save_image, write_jsonl, write_text
from distill.demo_world.question import Asker, Question
from distill.demo_world.scene import SEEN_PAIRS, Scene, draw, make_scene
from distill.demo_world.yes_no_questions import (
    count_check,
    existence,
    hue_check,
    ocr_check,
    place_check,
    poster_check,
    relation,
)

# MME category -> what this world asks there; what it has no counterpart for, it asks once more of another kind
MME_CATEGORIES: dict[str, Asker] = {
    "existence": existence,
    "count": count_check,
    "position": relation,
    "color": hue_check,
    "OCR": ocr_check,
    "posters": poster_check,
    "celebrity": existence,
    "scene": place_check,
    "landmark": place_check,
    "artwork": hue_check,
    "commonsense_reasoning": existence,
    "numerical_calculation": count_check,
    "text_translation": ocr_check,
    "code_reasoning": count_check,
}
MME_NESTED = ("posters", "celebrity", "scene", "landmark", "artwork")


def write_mme(folder: Path, rng: random.Random, items: int) -> int:
    """llava_mme.jsonl and MME_Benchmark_release_version/ with 14 categories; per picture one yes and one no."""
    root = folder / "MME_Benchmark_release_version"
    pictures = max(1, round(items / (2 * len(MME_CATEGORIES))))
    lines = []
    for category, asker in MME_CATEGORIES.items():
        images = f"{category}/images" if category in MME_NESTED else category
        truths = root / category / "questions_answers_YN" if category in MME_NESTED else root / category
        for number in range(1, pictures + 1):
            scene, pair = _yes_and_no(rng, asker)
            stem = (
                f"{number:012d}"
                if category in ("existence", "count", "position", "color")
                else f"{category}_{number:04d}"
            )
            image = f"{images}/{stem}.jpg"
            save_image(root / image, draw(scene, rng))
            truth = [f"{asked.text} Please answer yes or no.\t{asked.answer}\n" for asked in pair]
            write_text(truths / f"{stem}.txt", "".join(truth))
            lines += [loader_line(image, image, asked) | {"category": category} for asked in pair]
    write_jsonl(folder / "llava_mme.jsonl", lines)
    return len(lines)


def _yes_and_no(rng: random.Random, asker: Asker) -> tuple[Scene, list[Question]]:
    """A scene and two different questions on it, the first answered yes, the second no."""
    while True:
        scene = make_scene(rng, SEEN_PAIRS)
        asked = [question for question in (asker(scene, rng) for _ in range(20)) if question is not None]
        found = [next((question for question in asked if question.answer == answer), None) for answer in ("Yes", "No")]
        pair = [question for question in found if question is not None]
        if len(pair) == 2:
            return scene, pair
