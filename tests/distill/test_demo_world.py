"""The demo world: what it draws and asks is true, balanced, repeatable, in the real formats."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bundle.errors import UsageError
from distill.demo_world import demo_benchmarks
from distill.demo_world.choices import category_choice
from distill.demo_world.demo_benchmarks import DemoSummary, make_demo
from distill.demo_world.lessons import FAMILIES, conversation, drill, terse
from distill.demo_world.open_questions import describe
from distill.demo_world.question import LETTERS, SHORT_ANSWER, Question
from distill.demo_world.scene import (
    ANIMALS,
    CELL,
    COLOURS,
    LEXICON,
    PAIRS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    draw,
    make_scene,
    place_name,
    shape_mask,
)
from runtime_bench.accuracy.answers import Answer

TEACHER = Path(demo_benchmarks.__file__).parents[1] / "demo_teacher"
SCENES, ITEMS = 80, 24
BENCHMARKS = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoSummary]:
    folder = tmp_path_factory.mktemp("demo") / "data"
    return folder, make_demo(folder, seed=3, train_scenes=SCENES, test_items_per_benchmark=ITEMS)


def scenes(number: int, seed: int = 0) -> Iterator[tuple[Scene, random.Random]]:
    rng = random.Random(seed)
    for _ in range(number):
        yield make_scene(rng), rng


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- scenes and pictures


def test_scenes_keep_to_the_grid() -> None:
    for scene, _ in scenes(300):
        cells = [thing.cell for thing in scene.things] + ([] if scene.word_cell is None else [scene.word_cell])
        assert len(set(cells)) == len(cells) and all(0 <= cell < 9 for cell in cells)
        assert 1 <= len(scene.things) <= 5
        assert (scene.word is None) == (scene.word_cell is None)
        assert scene.word is None or scene.word in LEXICON


def test_a_thing_is_drawn_in_its_cell_and_colour() -> None:
    scene = Scene((Thing(5, "red", "square"), Thing(6, "blue", "circle")), None, None, "dark")
    picture = draw(scene, random.Random(1)).astype(float)
    red, blue = picture[CELL + 16, 2 * CELL + 16], picture[2 * CELL + 16, 16]
    assert np.abs(red - COLOURS["red"]).max() < 60 and np.abs(blue - COLOURS["blue"]).max() < 60
    assert picture[16, 16].max() < 110  # nothing at the top left of a dark picture


def test_a_word_is_drawn_where_it_says() -> None:
    blank = Scene((Thing(0, "red", "star"),), None, None, "bright")
    written = Scene(blank.things, "KEY", 4, "bright")
    difference = np.abs(draw(written, random.Random(2)).astype(int) - draw(blank, random.Random(2)).astype(int)).max(2)
    assert (draw(written, random.Random(2))[CELL : 2 * CELL, CELL : 2 * CELL].max(2) < 60).sum() > 20
    assert difference.shape == (96, 96)


def test_shapes_differ_from_each_other() -> None:
    masks = [shape_mask(shape, 24) for shape in SHAPES]
    assert all(np.abs(a - b).mean() > 0.05 for i, a in enumerate(masks) for b in masks[:i])


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'; known: circle"):
        shape_mask("blob", 24)


# ---- answers against the scene, by rules of their own


def true_answer(scene: Scene, text: str) -> str:
    """The answer to a question's text, worked out from the scene with regular expressions alone."""
    places = {place_name(cell): cell for cell in range(9)}
    found = dict.fromkeys(places)
    for thing in scene.things:
        found[place_name(thing.cell)] = thing
    place = "(" + "|".join(places) + ")"

    def number(what: str) -> int:
        word = what.removesuffix(" shapes")
        if what == "shapes":
            return len(scene.things)
        if word in COLOURS:
            return sum(thing.colour == word for thing in scene.things)
        return sum(thing.shape in (what[:-1], what[:-2]) for thing in scene.things)

    def only(text: str) -> Thing:
        colour, shape = text.split()
        (thing,) = [thing for thing in scene.things if thing.pair == (colour, shape)]
        return thing

    def yes(answer: bool) -> str:
        return "Yes" if answer else "No"

    if match := re.fullmatch(rf"What colou?r is the shape in the {place}\?", text):
        return found[match[1]].colour
    if match := re.fullmatch(r"What colou?r is the (\w+)\?", text):
        (thing,) = [thing for thing in scene.things if thing.shape == match[1]]
        return thing.colour
    if match := re.fullmatch(rf"What shape is in the {place}\?", text):
        return found[match[1]].shape
    if match := re.fullmatch(r"What shape is (\w+)\?", text):
        (thing,) = [thing for thing in scene.things if thing.colour == match[1]]
        return thing.shape
    if match := re.fullmatch(r"How many (.+) are there\?", text):
        return str(number(match[1]))
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", text):
        return place_name(only(match[1]).cell)
    if text in ("What is the word in the image?", "what word is written in the image?"):
        return str(scene.word)
    if match := re.fullmatch(r"Is there a (\w+) (\w+) in (?:the|this) image\?", text):
        return yes((match[1], match[2]) in [thing.pair for thing in scene.things])
    if match := re.fullmatch(r"Is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", text):
        a, b = only(match[1]), only(match[3])
        by = {
            "left of": b.column - a.column,
            "right of": a.column - b.column,
            "above": b.row - a.row,
            "below": a.row - b.row,
        }
        assert by[match[2]] != 0, "a relation must not be asked where it is a tie"
        return yes(by[match[2]] > 0)
    if match := re.fullmatch(r"Is the word in this image (\w+)\?", text):
        return yes(scene.word == match[1])
    if match := re.fullmatch(r"Is the number of (.+) in this image (\d)\?", text):
        return yes(number(match[1]) == int(match[2]))
    if match := re.fullmatch(rf"Is there a shape in the {place} of this image\?", text):
        return yes(found[match[1]] is not None)
    if match := re.fullmatch(r"Does this artwork have a (\w+) shape\?", text):
        return yes(number(f"{match[1]} shapes") > 0)
    if match := re.fullmatch(r"Is this poster titled (\w+)\?", text):
        return yes(scene.word == match[1])
    raise AssertionError(f"no rule for: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_true_of_its_scene(family: str) -> None:
    asked = [(scene, FAMILIES[family][1](scene, rng)) for scene, rng in scenes(400)]
    answered = [(scene, question) for scene, question in asked if question is not None]
    assert len(answered) >= 60
    for scene, question in answered:
        wanted = true_answer(scene, question.text)
        given = question.choices[LETTERS.index(question.answer)] if question.choices else question.answer
        assert given == wanted, question
        assert len(set(question.choices)) == len(question.choices)


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name.endswith("check") or name in ("existence", "relation")]
)
def test_yes_and_no_are_balanced(family: str) -> None:
    answers = Counter(
        question.answer for scene, rng in scenes(3000) if (question := FAMILIES[family][1](scene, rng)) is not None
    )
    assert set(answers) == {"Yes", "No"}
    assert 0.42 < answers["Yes"] / answers.total() < 0.58


def test_letters_are_balanced_and_no_option_is_a_second_answer() -> None:
    rng = random.Random(5)
    asked = [category_choice(rng) for _ in range(4000)]
    letters = Counter(question.answer for question in asked if len(question.choices) == 4)
    assert all(0.2 < letters[letter] / letters.total() < 0.3 for letter in LETTERS)
    groups = {"color": set(COLOURS), "shape": set(SHAPES), "number": set("012345"), "animal": set(ANIMALS)}
    for question in asked:
        group = groups[question.text.split()[-1].rstrip("?")]
        assert [option in group for option in question.choices].count(True) == 1
        assert question.choices[LETTERS.index(question.answer)] in group


def test_hints_are_noisy() -> None:
    asked = [question for scene, rng in scenes(2000) if (question := FAMILIES["hinted_word"][1](scene, rng))]
    hinted = [question for question in asked if question.reference is not None]
    right = sum(question.answer in (question.reference or ()) for question in hinted) / len(hinted)
    alone = sum(question.reference == (question.answer,) for question in hinted) / len(hinted)
    assert 0.5 < right < 0.8 and alone < 0.4
    assert f"Reference OCR token: {', '.join(hinted[0].reference or ())}" in hinted[0].prompt.split("\n")


def test_description_names_every_cell_that_holds_something() -> None:
    for scene, rng in scenes(100):
        parts = describe(scene, rng).answer.split(", ")
        assert len(parts) == len(scene.things) + (scene.word is not None)
        assert all(f"{place_name(thing.cell)} {thing.colour} {thing.shape}" in parts for thing in scene.things)


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("What color is the shape in the top left?", "color top left?"),
        ("What colour is the star?", "star?"),
        ("What shape is in the top left?", "shape top left?"),
        ("Where is the red star?", "red star?"),
        ("Is the red star above the blue star?", "Is the red star above the blue star?"),
        ("Is the number of red shapes in this image 2?", "Is the number of red shapes 2?"),
        ("Is this poster titled CAT?", "Is the word CAT?"),
        ("Is there a shape in the top left of this image?", "Is there a shape in the top left?"),
    ],
)
def test_drill_asks_the_same_tersely(full: str, short: str) -> None:
    asked = terse(Question("any", full, "A", ("red", "blue"), "Context: x."))
    assert asked.prompt == f"{short}\nA. red\nB. blue"
    assert asked.answer == "A"


def test_drill_is_true_and_has_every_kind() -> None:
    asked = [(scene, question) for scene, rng in scenes(200) for question in drill(scene, rng, 12)]
    firsts = {question.text.split()[0] for _, question in asked}
    assert {"top", "color", "red", "star?", "word?", "How", "Is"} <= firsts
    assert any(question.choices for _, question in asked)
    for scene, question in asked:
        places = {place_name(thing.cell): f"{thing.colour} {thing.shape}" for thing in scene.things}
        given = question.choices[LETTERS.index(question.answer)] if question.choices else question.answer
        named = question.text.rstrip("?")
        assert named not in places or given == places[named]
        assert named not in places.values() or places[given] == named


# ---- the written files


def test_same_seed_same_bytes(demo: tuple[Path, DemoSummary], tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert make_demo(again, seed=3, train_scenes=SCENES, test_items_per_benchmark=ITEMS) == demo[1]
    assert digest(again) == digest(demo[0])
    make_demo(tmp_path / "other", seed=4, train_scenes=2, test_items_per_benchmark=2)
    assert (tmp_path / "other" / "train.json").read_bytes() != (again / "train.json").read_bytes()


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_training_file(demo: tuple[Path, DemoSummary]) -> None:
    folder, summary = demo
    rows = read_json(folder / "train.json")
    assert len(rows) == summary.train_rows == SCENES
    assert sum(len(row["conversations"]) for row in rows) == 2 * summary.train_turns
    for row in rows:
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        markers = [turn["value"].count("<image>") for turn in row["conversations"]]
        assert markers == [int("image" in row)] + [0] * (len(markers) - 1)
        assert "image" not in row or Image.open(folder / row["image"]).size == (96, 96)
    assert any("image" not in row for row in rows)
    firsts = [row["conversations"][0]["value"] for row in rows]
    assert 0.05 < sum(first.endswith("Describe the image.") for first in firsts) / SCENES < 0.3


def test_training_never_shows_or_asks_an_unseen_pair() -> None:
    rng = random.Random(6)
    for _ in range(400):
        scene = make_scene(rng, SEEN_PAIRS)
        assert not {thing.pair for thing in scene.things} & set(UNSEEN_PAIRS)
        for question in conversation(scene, rng, 5):
            if question.family == "existence":
                assert not any(f"a {colour} {shape} " in question.text for colour, shape in UNSEEN_PAIRS)
    assert {thing.pair for thing in demo_benchmarks.unseen_scene(rng).things} & set(UNSEEN_PAIRS)
    assert len(SEEN_PAIRS) + len(UNSEEN_PAIRS) == len(PAIRS)


def test_no_picture_is_in_two_sets(demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0]
    pictures = {path: Image.open(path).tobytes() for path in folder.rglob("*") if path.suffix in (".jpg", ".png")}
    for row in read_tsv(folder / "benchmarks" / "mmbench"):
        if int(row["index"]) < 1_000_000:
            pictures[Path(row["index"])] = Image.open(io.BytesIO(base64.b64decode(row["image"]))).tobytes()
    hashes = [hashlib.sha256(pixels).hexdigest() for pixels in pictures.values()]
    assert len(set(hashes)) == len(hashes) > 200


def test_existing_output_and_empty_world_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        make_demo(tmp_path, 0, 1, 1)
    with pytest.raises(UsageError, match=r"at least one training scene \(got 0\)"):
        make_demo(tmp_path / "new", 0, 0, 1)
    assert not (tmp_path / "new").exists()


# ---- the six formats, by a reader of their own


def read_tsv(folder: Path) -> list[dict[str, str]]:
    with (folder / "mmbench_dev_en_20231003.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_gqa_files(demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0] / "benchmarks" / "gqa"
    annotations = read_json(folder / "testdev_balanced_questions.json")
    for line in read_jsonl(folder / "llava_gqa_testdev_balanced.jsonl"):
        entry = annotations[line["question_id"]]
        assert line["text"] == entry["question"] + SHORT_ANSWER
        assert line["image"] == entry["imageId"] + ".jpg" and (folder / "images" / line["image"]).is_file()
        assert entry["isBalanced"] and entry["answer"] == entry["answer"].lower() and entry["groups"]["global"]
        assert (entry["types"]["structural"] == "query") == (entry["answer"] not in ("yes", "no"))


def test_sqa_files(demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0] / "benchmarks" / "sqa"
    problems, lines = read_json(folder / "problems.json"), read_json(folder / "llava_test_CQM-A.json")
    assert read_json(folder / "pid_splits.json")["test"] == [line["id"] for line in lines] == list(problems)
    for line in lines:
        problem = problems[line["id"]]
        text = line["conversations"][0]["value"]
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
        assert text.removeprefix("<image>\n") == context + problem["question"] + options
        assert text.startswith("<image>\n") == ("image" in line) == (problem["image"] is not None)
        assert "image" not in line or (folder / "images" / "test" / line["image"]).is_file()
        assert line["conversations"][1]["value"] == LETTERS[problem["answer"]]
    assert {problem["image"] for problem in problems.values()} == {"image.png", None}


def test_textvqa_files(demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0] / "benchmarks" / "textvqa"
    entries = {entry["image_id"]: entry for entry in read_json(folder / "TextVQA_0.5.1_val.json")["data"]}
    hinted, plain = (read_jsonl(folder / f"llava_textvqa_val_v051{name}.jsonl") for name in ("_ocr", ""))
    assert len(hinted) == len(plain) == len(entries) == ITEMS
    for line, twin in zip(hinted, plain, strict=True):
        entry = entries[line["question_id"]]
        question, hint, suffix = line["text"].split("\n")
        assert (
            question == entry["question"] and hint.startswith("Reference OCR token: ") and "\n" + suffix == SHORT_ANSWER
        )
        assert twin["text"] == question + SHORT_ANSWER and twin["image"] == line["image"]
        assert len(entry["answers"]) == 10 and (folder / "train_images" / line["image"]).is_file()


def test_pope_files(demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0] / "benchmarks" / "pope"
    lines = read_jsonl(folder / "llava_pope_test.jsonl")
    assert len({line["question_id"] for line in lines}) == len(lines)
    assert {path.name for path in (folder / "coco").iterdir()} == {
        f"coco_pope_{category}.json" for category in ("random", "popular", "adversarial")
    }
    for category in ("random", "popular", "adversarial"):
        labels = read_jsonl(folder / "coco" / f"coco_pope_{category}.json")
        mine = [line for line in lines if line["category"] == category]
        assert [label["text"] + SHORT_ANSWER for label in labels] == [line["text"] for line in mine]
        assert [label["question_id"] for label in labels] == list(range(1, len(labels) + 1))
        for image, group in by_image(labels).items():
            assert Counter(label["label"] for label in group) == {"yes": 3, "no": 3}
            assert (folder / "val2014" / image).is_file()


def by_image(labels: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        image: [label for label in labels if label["image"] == image] for image in {label["image"] for label in labels}
    }


def test_mme_files(demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0] / "benchmarks" / "mme"
    root = folder / "MME_Benchmark_release_version"
    lines = read_jsonl(folder / "llava_mme.jsonl")
    assert len({line["category"] for line in lines}) == len(list(root.iterdir())) == 14
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        assert first["image"] == second["image"] == first["question_id"]
        image = root / first["image"]
        nested = image.parent.name == "images"
        truth = (image.parents[1] / "questions_answers_YN" if nested else image.parent) / f"{image.stem}.txt"
        rows = [line.split("\t") for line in truth.read_text(encoding="utf-8").splitlines()]
        assert [row[1] for row in rows] == ["Yes", "No"] and image.is_file()
        for row, line in zip(rows, (first, second), strict=True):
            assert row[0].removesuffix(" Please answer yes or no.") + SHORT_ANSWER == line["text"]


def test_mmbench_file(demo: tuple[Path, DemoSummary]) -> None:
    rows = read_tsv(demo[0] / "benchmarks" / "mmbench")
    base = {int(row["index"]): row for row in rows if int(row["index"]) < 1_000_000}
    assert len(base) == ITEMS
    for row in rows:
        turn, index = divmod(int(row["index"]), 1_000_000)
        options = [base[index][letter] for letter in LETTERS if base[index][letter]]
        rolled = [row[letter] for letter in LETTERS if row[letter]]
        assert rolled == options[turn:] + options[:turn] and len(options) in (3, 4)
        assert row[row["answer"]] == base[index][base[index]["answer"]]
        assert Image.open(io.BytesIO(base64.b64decode(row["image"]))).size == (96, 96)
    assert len(rows) == sum(sum(bool(row[letter]) for letter in LETTERS) for row in base.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_get_the_full_score(name: str, demo: tuple[Path, DemoSummary]) -> None:
    folder = demo[0] / "benchmarks"
    benchmark = importlib.import_module(f"runtime_bench.accuracy.{name}")
    right = right_answers(folder / name)
    questions = benchmark.questions(folder)
    assert len(questions) == demo[1].benchmarks[name]
    answers = [
        Answer(question_id=question.question_id, prompt=question.prompt, text=right(question)) for question in questions
    ]
    score = benchmark.score(folder, answers)
    assert score.score == pytest.approx(2000 if name == "mme" else 100)
    assert score.n_scored == score.n_expected and not score.warnings


def right_answers(folder: Path) -> Any:
    """The right answer to a Question of runtime_bench, from the annotation files."""
    name = folder.name
    if name == "gqa":
        annotations = read_json(folder / "testdev_balanced_questions.json")
        return lambda question: annotations[question.question_id]["answer"]
    if name == "sqa":
        problems = read_json(folder / "problems.json")
        return lambda question: LETTERS[problems[question.question_id]["answer"]]
    if name == "textvqa":
        entries = {entry["image_id"]: entry for entry in read_json(folder / "TextVQA_0.5.1_val.json")["data"]}
        return lambda question: entries[question.question_id]["answers"][0].upper()
    if name == "mmbench":
        rows = {row["index"]: row["answer"] for row in read_tsv(folder)}
        return lambda question: rows[str(question.question_id)]
    if name == "pope":
        labels = [label for path in (folder / "coco").iterdir() for label in read_jsonl(path)]
        truth = {(label["image"], label["text"]): label["label"] for label in labels}
    else:
        lines = [
            (path.stem, *line.split("\t")) for path in folder.rglob("*.txt") for line in path.read_text().splitlines()
        ]
        truth = {
            (f"{stem}.jpg", text.removesuffix(" Please answer yes or no.")): answer for stem, text, answer in lines
        }
    return lambda question: truth[question.image.name, question.text.split("\n")[0]].capitalize()
