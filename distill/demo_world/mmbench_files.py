"""Demo world -> MMBench dev: one TSV with base64 pictures and circular rotations."""

from __future__ import annotations

import base64
import csv
import io
import random
from pathlib import Path

from distill.demo_world.choices import with_choices
from distill.demo_world.files import ask, png_bytes, write_text
from distill.demo_world.open_questions import colour, count, shape, where, word
from distill.demo_world.question import LETTERS, Asker
from distill.demo_world.scene import draw

CIRCULAR_STEP = 1_000_000  # index of a rotation = index of its question + k of these
# open family -> MMBench's category and its group
MMBENCH_CATEGORIES: dict[str, tuple[Asker, str, str]] = {
    "colour": (colour, "attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": (shape, "object_localization", "finegrained_perception (instance-level)"),
    "count": (count, "structuralized_imagetext_understanding", "logic_reasoning"),
    "where": (where, "spatial_relationship", "finegrained_perception (cross-instance)"),
    "word": (word, "ocr", "finegrained_perception (instance-level)"),
}


def write_mmbench(folder: Path, rng: random.Random, items: int) -> int:
    """mmbench_dev_en_20231003.tsv with base64 PNG: ``items`` questions, their circular rotations as extra rows."""
    columns = (
        "index",
        "question",
        "hint",
        *LETTERS,
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    )
    rows = []
    names = list(MMBENCH_CATEGORIES)
    for number in range(items):
        asker, category, group = MMBENCH_CATEGORIES[names[number % len(names)]]
        scene, asked = ask(rng, asker)
        choice = with_choices(asked, rng, rng.choice((3, 4, 4)), context=rng.random() < 0.2)
        png = base64.b64encode(png_bytes(draw(scene, rng))).decode()
        shared = {
            "question": choice.text,
            "hint": choice.lead,
            "category": category,
            "image": png,
            "source": "demo world",
        }
        shared |= {"l2-category": group, "comment": "", "split": "dev"}
        right = choice.choices[LETTERS.index(choice.answer)]
        for turn in range(len(choice.choices)):
            options = choice.choices[turn:] + choice.choices[:turn]
            lettered = dict(zip(LETTERS, options, strict=False))
            index = {"index": str(241 + number + turn * CIRCULAR_STEP), "answer": LETTERS[options.index(right)]}
            rows.append(index | shared | lettered)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", delimiter="\t", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder / "mmbench_dev_en_20231003.tsv", text.getvalue())
    return len(rows)
