"""Scenes and questions -> the six benchmarks' folders, in the file formats of the public releases."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.demo_world import SEEN_PAIRS, Scene, draw, make_scene
from distill.demo_world_questions import (
    FAMILIES,
    LETTERS,
    SHORT_ANSWER,
    Asker,
    Question,
    animal_check,
    colour,
    colour_check,
    count,
    count_check,
    crossed_pairs,
    existence,
    exists,
    hinted_word,
    hue_check,
    length_check,
    ocr_check,
    place_check,
    poster_check,
    relation,
    shape,
    shape_check,
    sum_check,
    text_conversation,
    translation_check,
    where,
    with_choices,
    word,
)
from distill.demo_world_questions import background_check as scene_check

JPEG_QUALITY = 95
CONTEXT = "Context: "
CIRCULAR_STEP = 1_000_000  # MMBench: index of a rotation = index of its question + k of these

# GQA family -> its asker and the release's question types (structural, semantic, detailed) and program
GQA_FAMILIES: dict[str, tuple[Asker, str, str, str, tuple[str, ...]]] = {
    "colour": (colour, "query", "attr", "directWhich", ("select", "query")),
    "shape": (shape, "query", "obj", "categoryThat", ("select", "query")),
    "count": (count, "query", "global", "countAll", ("select", "count")),
    "where": (where, "query", "attr", "positionQuery", ("select", "query")),
    "existence": (existence, "verify", "obj", "existAttr", ("select", "filter", "exist")),
    "relation": (relation, "verify", "rel", "relVerify", ("select", "select", "verify rel")),
    "colour_check": (colour_check, "verify", "attr", "verifyAttr", ("select", "verify color")),
}
# MME category -> what this world asks there; the last ten of the release's names count as perception
MME_CATEGORIES: dict[str, Asker] = {
    "existence": existence,
    "count": count_check,
    "position": relation,
    "color": colour_check,
    "OCR": ocr_check,
    "posters": poster_check,
    "celebrity": shape_check,
    "scene": scene_check,
    "landmark": place_check,
    "artwork": hue_check,
    "commonsense_reasoning": animal_check,
    "numerical_calculation": sum_check,
    "text_translation": translation_check,
    "code_reasoning": length_check,
}
MME_NESTED = ("posters", "celebrity", "scene", "landmark", "artwork")
# open family -> MMBench's category and its group
MMBENCH_CATEGORIES: dict[str, tuple[Asker, str, str]] = {
    "colour": (colour, "attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": (shape, "object_localization", "finegrained_perception (instance-level)"),
    "count": (count, "structuralized_imagetext_understanding", "logic_reasoning"),
    "where": (where, "spatial_relationship", "finegrained_perception (cross-instance)"),
    "word": (word, "ocr", "finegrained_perception (instance-level)"),
}


def write_gqa(folder: Path, rng: random.Random, items: int) -> int:
    """llava_gqa_testdev_balanced.jsonl, testdev_balanced_questions.json, images/."""
    lines, annotations = [], {}
    names = list(GQA_FAMILIES)
    for number in range(items):
        asker, *types, steps = GQA_FAMILIES[names[number % len(names)]]
        scene, asked = _ask(rng, asker)
        image, qid = f"n{100001 + number}", f"{201307251 + number}"
        save_image(folder / "images" / f"{image}.jpg", draw(scene, rng))
        lines.append(_line(qid, f"{image}.jpg", asked))
        annotations[qid] = _gqa_annotation(qid, image, asked, types, steps)
    _write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    _write_json(folder / "testdev_balanced_questions.json", annotations)
    return len(lines)


def _gqa_annotation(
    qid: str, image: str, asked: Question, types: list[str], steps: tuple[str, ...]
) -> dict[str, object]:
    program = [
        {
            "operation": step,
            "dependencies": [number - 1] if number else [],
            "argument": asked.family if number else "shape (1)",
        }
        for number, step in enumerate(steps)
    ]
    return {
        "semantic": program,
        "entailed": [],
        "equivalent": [qid],
        "question": asked.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": asked.family, "local": f"{asked.family}-shape"},
        "answer": asked.answer.lower(),
        "semanticStr": "->".join(f"{step['operation']}: {step['argument']}" for step in program),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": dict(zip(("structural", "semantic", "detailed"), types, strict=True)),
        "fullAnswer": f"{asked.answer}.",
    }


def write_sqa(folder: Path, rng: random.Random, items: int) -> int:
    """llava_test_CQM-A.json, problems.json, pid_splits.json, images/test/<pid>/image.png; a fifth has no picture."""
    lines, problems = [], {}
    for number in range(items):
        pid = str(4 + 3 * number)
        with_image = number % 5 != 4
        if with_image:
            scene, asked = _ask(rng, FAMILIES["choice"][1])
            save_image(folder / "images" / "test" / pid / "image.png", draw(scene, rng))
        else:
            asked = text_conversation(rng, 1)[0]
        marker = "<image>\n" if with_image else ""
        turns = [{"from": "human", "value": marker + asked.body}, {"from": "gpt", "value": asked.answer}]
        lines.append({"id": pid} | ({"image": f"{pid}/image.png"} if with_image else {}) | {"conversations": turns})
        problems[pid] = _sqa_problem(asked, with_image)
    _write_json(folder / "llava_test_CQM-A.json", lines)
    _write_json(folder / "problems.json", problems)
    splits: dict[str, list[str]] = {name: [] for name in ("train", "val", "minival", "minitest")}
    _write_json(folder / "pid_splits.json", splits | {"test": list(problems)})
    return len(lines)


def _sqa_problem(asked: Question, with_image: bool) -> dict[str, object]:
    return {
        "question": asked.text,
        "choices": list(asked.choices),
        "answer": LETTERS.index(asked.answer),
        "hint": asked.lead.removeprefix(CONTEXT),
        "image": "image.png" if with_image else None,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science" if with_image else "language science",
        "topic": "shapes",
        "category": asked.family,
        "skill": "look and choose" if with_image else "read and choose",
        "lecture": "",
        "solution": f"The answer is {asked.answer}.",
        "split": "test",
    }


def write_textvqa(folder: Path, rng: random.Random, items: int) -> int:
    """llava_textvqa_val_v051_ocr.jsonl and its twin without hints, TextVQA_0.5.1_val.json, train_images/."""
    with_hints, without, data = [], [], []
    for number in range(items):
        scene, asked = _ask(rng, hinted_word, lambda question: question.reference is not None)
        image = f"{rng.getrandbits(64):016x}"
        save_image(folder / "train_images" / f"{image}.jpg", draw(scene, rng))
        with_hints.append(_line(image, f"{image}.jpg", asked))
        without.append(with_hints[-1] | {"text": asked.text + SHORT_ANSWER})
        data.append(_textvqa_entry(number, image, asked))
    _write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", with_hints)
    _write_jsonl(folder / "llava_textvqa_val_v051.jsonl", without)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    _write_json(folder / "TextVQA_0.5.1_val.json", head | {"data": data})
    return len(data)


def _textvqa_entry(number: int, image: str, asked: Question) -> dict[str, object]:
    answer = asked.answer.lower()
    return {
        "question": asked.text,
        "image_id": image,
        "image_classes": ["Sign"],
        "flickr_original_url": "https://example.invalid/o.jpg",
        "flickr_300k_url": "https://example.invalid/z.jpg",
        "image_width": 96,
        "image_height": 96,
        "answers": [answer] * 8 + [f"{answer} sign", "unanswerable"],
        "question_tokens": asked.text.rstrip("?").split(),
        "question_id": 34602 + number,
        "set_name": "val",
    }


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
                lines.append(_line(offset + number, name, asked) | {"category": category})
        _write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    _write_jsonl(folder / "llava_pope_test.jsonl", lines)
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
            _write_text(truths / f"{stem}.txt", "".join(truth))
            lines += [_line(image, image, asked) | {"category": category} for asked in pair]
    _write_jsonl(folder / "llava_mme.jsonl", lines)
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
        scene, asked = _ask(rng, asker)
        choice = with_choices(asked, rng, rng.choice((3, 4, 4)), context=rng.random() < 0.2)
        png = base64.b64encode(_png(draw(scene, rng))).decode()
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
    _write_text(folder / "mmbench_dev_en_20231003.tsv", text.getvalue())
    return len(rows)


WRITERS: dict[str, Callable[[Path, random.Random, int], int]] = {
    "gqa": write_gqa,
    "sqa": write_sqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "mme": write_mme,
    "mmbench": write_mmbench,
}


def save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a JPEG, or a PNG where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(_png(pixels))
    else:
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY, subsampling=0)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def _ask(
    rng: random.Random, asker: Asker, wanted: Callable[[Question], bool] = lambda question: True
) -> tuple[Scene, Question]:
    """A scene on which ``asker`` has a question, and the question."""
    while True:
        scene = make_scene(rng, SEEN_PAIRS)
        asked = asker(scene, rng)
        if asked is not None and wanted(asked):
            return scene, asked


def _line(question_id: str | int, image: str, asked: Question) -> dict[str, object]:
    return {"question_id": question_id, "image": image, "text": asked.prompt, "category": "default"}


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    _write_text(path, json.dumps(value, indent=1) + "\n")


def _write_jsonl(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    _write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
