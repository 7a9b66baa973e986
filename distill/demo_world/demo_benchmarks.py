"""Seed -> a folder with LLaVA training data, two held-out sets and the six benchmarks, all of the demo world."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from bundle.staging import fresh_directory
from distill.demo_world.files import save_image
from distill.demo_world.gqa_files import write_gqa
from distill.demo_world.lessons import FAMILIES, TEXT_FAMILIES, conversation, drill, text_conversation
from distill.demo_world.mmbench_files import write_mmbench
from distill.demo_world.mme_files import write_mme
from distill.demo_world.open_questions import describe
from distill.demo_world.pope_files import write_pope
from distill.demo_world.question import Question
from distill.demo_world.scene import PAIRS, SEEN_PAIRS, UNSEEN_PAIRS, Scene, draw, make_scene
from distill.demo_world.sqa_files import write_sqa
from distill.demo_world.textvqa_files import write_textvqa

TURNS = 5  # questions on one scene, or in one row without an image
DRILL_TURNS = 12  # terse questions on one scene
# kind of row -> share: a small decoder reads pictures through descriptions and drills, which are rich in answers, and
# sits on the language prior for long without them
LESSONS = {"describe": 0.15, "drill": 0.35, "instruct": 0.45, "text": 0.05}
BARE_SHARE = 0.15  # questions without the benchmarks' suffix, as a user of the app asks
TRAIN, TEST, UNSEEN = "train", "test", "unseen_pairs"

Row = dict[str, Any]  # one entry of a LLaVA file
WRITERS: dict[str, Callable[[Path, random.Random, int], int]] = {
    "gqa": write_gqa,
    "sqa": write_sqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "mme": write_mme,
    "mmbench": write_mmbench,
}


@dataclass(frozen=True)
class DemoSummary:
    """What was written.

    Args:
        train_rows: conversations in train.json.
        train_turns: questions in them.
        test_rows: questions in test.json; unseen_rows: in unseen_pairs.json.
        benchmarks: name -> number of questions.
    """

    train_rows: int
    train_turns: int
    test_rows: int
    unseen_rows: int
    benchmarks: dict[str, int]


def make_demo(output: Path, seed: int, train_scenes: int, test_items_per_benchmark: int) -> DemoSummary:
    """Write the demo world into a new folder.

    ``train.json`` holds multi-turn conversations; ``test.json`` single questions of every family on other scenes of
    the same kind; ``unseen_pairs.json`` on scenes with colour-shape pairs that training never shows; ``benchmarks/``
    the six benchmarks.

    Raises:
        UsageError: ``output`` exists, or a number is not positive.
    """
    if train_scenes < 1 or test_items_per_benchmark < 1:
        raise UsageError(
            f"the demo world needs at least one training scene (got {train_scenes}) and one item per benchmark "
            f"(got {test_items_per_benchmark})"
        )
    with fresh_directory(output) as folder:
        rows = training_rows(folder, random.Random(f"{seed} train"), train_scenes)
        _write_json(folder / "train.json", rows)
        per_family = max(1, test_items_per_benchmark // 3)
        held_out = {
            name: held_out_rows(folder, name, random.Random(f"{seed} {name}"), per_family) for name in (TEST, UNSEEN)
        }
        for name, rows_of in held_out.items():
            _write_json(folder / f"{name}.json", rows_of)
        sizes = {
            name: writer(folder / "benchmarks" / name, random.Random(f"{seed} {name}"), test_items_per_benchmark)
            for name, writer in WRITERS.items()
        }
    questions = sum(len(row["conversations"]) // 2 for row in rows)
    return DemoSummary(len(rows), questions, len(held_out[TEST]), len(held_out[UNSEEN]), sizes)


def training_rows(
    folder: Path, rng: random.Random, scenes: int, pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS
) -> list[Row]:
    """Draw ``scenes`` conversations of the kinds in LESSONS; pictures go to images/train."""
    rows: list[Row] = []
    for number in range(scenes):
        name = f"{TRAIN}_{number:06d}"
        lesson = rng.choices(list(LESSONS), list(LESSONS.values()))[0]
        if lesson == "text":
            rows.append({"id": name, "conversations": turns(text_conversation(rng, TURNS), False)})
            continue
        scene = make_scene(rng, pairs)
        image = f"images/{TRAIN}/{name}.jpg"
        save_image(folder / image, draw(scene, rng))
        questions = _lesson(lesson, scene, rng)
        rows.append(
            {"id": name, "image": image, "conversations": turns(questions, True, lambda: rng.random() < BARE_SHARE)}
        )
    return rows


def _lesson(name: str, scene: Scene, rng: random.Random) -> list[Question]:
    if name == "describe":
        return [describe(scene, rng)]
    return drill(scene, rng, DRILL_TURNS) if name == "drill" else conversation(scene, rng, TURNS)


def turns(
    questions: list[Question], with_image: bool, bare: Callable[[], bool] = lambda: False
) -> list[dict[str, str]]:
    """Questions -> LLaVA turns, the image marker in front of the first; ``bare`` says whether to leave a suffix out."""
    written = []
    for number, asked in enumerate(questions):
        text = asked.body if not asked.choices and bare() else asked.prompt
        marker = "<image>\n" if with_image and number == 0 else ""
        written.append({"from": "human", "value": marker + text})
        written.append({"from": "gpt", "value": asked.answer})
    return written


def held_out_rows(folder: Path, name: str, rng: random.Random, per_family: int) -> list[Row]:
    """The same number of single questions for every family; a row names its family, pictures go to images/``name``."""
    families = [*FAMILIES, *(TEXT_FAMILIES if name == TEST else ())]
    rows: list[Row] = []
    for family in families:
        for _ in range(per_family):
            row: Row = {"id": f"{name}_{len(rows):06d}", "family": family}
            if family in TEXT_FAMILIES:
                asked = TEXT_FAMILIES[family](rng)
            else:
                scene, asked = _ask(rng, family, unseen=name == UNSEEN)
                row["image"] = f"images/{name}/{row['id']}.jpg"
                save_image(folder / row["image"], draw(scene, rng))
            rows.append(row | {"conversations": turns([asked], family in FAMILIES)})
    return rows


def _ask(rng: random.Random, family: str, unseen: bool) -> tuple[Scene, Question]:
    """A scene on which a family has a question, and the question."""
    while True:
        scene = unseen_scene(rng) if unseen else make_scene(rng, SEEN_PAIRS)
        asked = FAMILIES[family][1](scene, rng)
        if asked is not None:
            return scene, asked


def unseen_scene(rng: random.Random) -> Scene:
    """A scene with at least one pair that no training file shows."""
    while True:
        scene = make_scene(rng, PAIRS)
        if any(thing.pair in UNSEEN_PAIRS for thing in scene.things):
            return scene


def _write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
