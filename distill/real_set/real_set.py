"""Pictures of scikit-image's wheel + real_set.json -> hand-written questions as LLaVA files and a GQA folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bundle.errors import UsageError, missing_extra
from bundle.staging import fresh_directory, inside, sha256_of

PAIRS_FILE = Path(__file__).with_name("real_set.json")
SPLITS = ("train", "test")
PROGRAMS = {"verify": "exist", "choose": "choose", "query": "query"}  # GQA's last program step for each structure


class Picture(BaseModel):
    """One picture of the wheel: its split, the bytes it must have, where it comes from, what may be done with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    sha256: str
    origin: str
    licence: str


class Pair(BaseModel):
    """A question and its answer, written and checked by looking at the picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    picture: str
    question: str
    answer: str
    structure: str
    topic: str


class RealSet(BaseModel):
    """What real_set.json holds. No picture is in both splits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    source: str
    instruction: str
    pictures: dict[str, Picture]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class RealSummary:
    """How much was written."""

    output: Path
    train: int
    test: int
    pictures: int


def read_real_set() -> RealSet:
    """The committed questions."""
    return RealSet.model_validate_json(PAIRS_FILE.read_text(encoding="utf-8"))


def wheel_pictures() -> Path:
    """The folder of pictures inside the installed scikit-image.

    Raises:
        UsageError: scikit-image is not installed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise missing_extra("scikit-image", "data")
    return Path(found.origin).parent / "data"


def make_real(output: Path) -> RealSummary:
    """Write train.json, test.json, images/, LICENCES.md and benchmarks/gqa/ (the test pairs) to a new directory.

    Raises:
        UsageError: ``output`` exists, scikit-image is missing, or a picture is not the one that was asked about.
    """
    real, wheel = read_real_set(), wheel_pictures()
    with fresh_directory(output) as folder:
        (folder / "images").mkdir()
        for name, picture in real.pictures.items():
            _copy_picture(inside(wheel, name, "picture"), folder / "images" / name, picture)
        for split in SPLITS:
            _write_json(folder / f"{split}.json", llava_rows(real, split))
        (folder / "LICENCES.md").write_text(licence_notes(real), encoding="utf-8")
        _write_gqa(real, folder)
    counts = {split: len(llava_rows(real, split)) for split in SPLITS}
    return RealSummary(output, counts["train"], counts["test"], len(real.pictures))


def llava_rows(real: RealSet, split: str) -> list[dict[str, Any]]:
    """One split as LLaVA conversations of one question each."""
    return [
        {
            "id": name,
            "image": f"images/{pair.picture}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{pair.question}\n{real.instruction}"},
                {"from": "gpt", "value": pair.answer},
            ],
        }
        for name, pair in _named(real, split)
    ]


def gqa_questions(real: RealSet) -> list[dict[str, str]]:
    """The test split as lines of llava_gqa_testdev_balanced.jsonl."""
    return [
        {
            "question_id": name,
            "image": pair.picture,
            "text": f"{pair.question}\n{real.instruction}",
            "category": "default",
        }
        for name, pair in _named(real, "test")
    ]


def gqa_annotations(real: RealSet) -> dict[str, dict[str, Any]]:
    """The test split as testdev_balanced_questions.json."""
    return {
        name: {
            "question": pair.question,
            "imageId": Path(pair.picture).stem,
            "answer": pair.answer,
            "fullAnswer": f"{pair.answer}.",
            "isBalanced": True,
            "types": {"structural": pair.structure, "semantic": "obj", "detailed": f"{pair.topic}_{pair.structure}"},
            "groups": {"global": pair.topic, "local": f"{pair.topic}-{Path(pair.picture).stem}"},
            "semantic": [
                {"operation": "select", "dependencies": [], "argument": "scene"},
                {"operation": PROGRAMS[pair.structure], "dependencies": [0], "argument": pair.topic},
            ],
            "semanticStr": f"select: scene->{PROGRAMS[pair.structure]}: {pair.topic} [0]",
            "entailed": [],
            "equivalent": [name],
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        }
        for name, pair in _named(real, "test")
    }


def licence_notes(real: RealSet) -> str:
    """Where each picture comes from, in words that travel with the copies."""
    lines = ["# Pictures", "", f"Copied unchanged from the {real.source}."]
    lines += ["What scikit-image's documentation says of each:", ""]
    lines += [f"- {name}: {picture.origin}. {picture.licence}" for name, picture in sorted(real.pictures.items())]
    return "\n".join(lines) + "\n"


def _named(real: RealSet, split: str) -> list[tuple[str, Pair]]:
    """The pairs of a split with their ids, real_<picture>_<number among that picture's pairs>."""
    seen: dict[str, int] = {}
    named = []
    for pair in real.pairs:
        number = seen[pair.picture] = seen.get(pair.picture, -1) + 1
        if real.pictures[pair.picture].split == split:
            named.append((f"real_{Path(pair.picture).stem}_{number}", pair))
    return named


def _copy_picture(source: Path, target: Path, picture: Picture) -> None:
    if not source.is_file() or sha256_of(source) != picture.sha256:
        state = "is not the picture that the questions were written for" if source.is_file() else "is missing"
        raise UsageError(f"{source} {state}; run: pip install 'scikit-image>=0.26,<0.27'")
    shutil.copyfile(source, target)


def _write_gqa(real: RealSet, folder: Path) -> None:
    gqa = folder / "benchmarks" / "gqa"
    (gqa / "images").mkdir(parents=True)
    for name, picture in real.pictures.items():
        if picture.split == "test":
            shutil.copyfile(folder / "images" / name, gqa / "images" / name)
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in gqa_questions(real))
    (gqa / "llava_gqa_testdev_balanced.jsonl").write_text(lines, encoding="utf-8")
    _write_json(gqa / "testdev_balanced_questions.json", gqa_annotations(real))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
