"""Demo world -> POPE: question file, labels of the three categories, pictures."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from distill.demo_world.files import loader_line, save_image, write_jsonl
from distill.demo_world.question import Question
from distill.demo_world.scene import SEEN_PAIRS, Scene, draw, make_scene
from distill.demo_world.yes_no_questions import crossed_pairs, exists


def write_pope(folder: Path, rng: random.Random, items: int) -> int:
    """llava_pope_test.jsonl, coco/coco_pope_<category>.json (jsonl), val2014/; per picture 3 yes and 3 no a category.

    Random absent pairs; popular: the most frequent pairs of these pictures; adversarial: a colour and a shape of the
    picture that are not together.
    """
    scenes = [_pope_scene(rng) for _ in range(max(1, round(items / 18)))]
    names = [f"COCO_val2014_{310196 + 17 * number:012d}.jpg" for number in range(len(scenes))]
    for scene, name in zip(scenes, names, strict=True):
        save_image(folder / "val2014" / name, draw(scene, rng))
    frequency = Counter(thing.pair for scene in scenes for thing in scene.things)
    common = sorted(SEEN_PAIRS, key=lambda pair: -frequency[pair])
    lines = []
    for offset, category in ((0, "adversarial"), (1_000_000, "popular"), (10_000_000, "random")):
        labels: list[dict[str, object]] = []
        for scene, name in zip(scenes, names, strict=True):
            for asked in _pope_questions(scene, category, common, rng):
                number = len(labels) + 1
                labels.append({"question_id": number, "image": name, "text": asked.text, "label": asked.answer.lower()})
                lines.append(loader_line(offset + number, name, asked) | {"category": category})
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", lines)
    return len(lines)


def _pope_scene(rng: random.Random) -> Scene:
    """A scene with three pairs to affirm and three adversarial ones to deny."""
    while True:
        scene = make_scene(rng, SEEN_PAIRS)
        if len({thing.pair for thing in scene.things}) >= 3 and len(crossed_pairs(scene)) >= 3:
            return scene


def _pope_questions(scene: Scene, category: str, common: list[tuple[str, str]], rng: random.Random) -> list[Question]:
    have = sorted({thing.pair for thing in scene.things})
    absent = [pair for pair in common if pair not in have]
    denied = {
        "adversarial": lambda: rng.sample(crossed_pairs(scene), 3),
        "popular": lambda: absent[:3],
        "random": lambda: rng.sample(absent, 3),
    }[category]()
    affirmed = rng.sample(have, 3)
    return [
        exists(pair, answer)
        for yes, no in zip(affirmed, denied, strict=True)
        for pair, answer in ((yes, True), (no, False))
    ]
