"""Demo world -> GQA testdev-balanced: question file, annotations, pictures."""

from __future__ import annotations

import random
from pathlib import Path

from distill.demo_world.files import ask, loader_line, save_image, write_json, write_jsonl
from distill.demo_world.open_questions import colour, count, shape, where
from distill.demo_world.question import Asker, Question
from distill.demo_world.scene import draw
from distill.demo_world.yes_no_questions import existence, hue_check, relation

# GQA family -> its asker and the release's question types (structural, semantic, detailed) and program
GQA_FAMILIES: dict[str, tuple[Asker, str, str, str, tuple[str, ...]]] = {
    "colour": (colour, "query", "attr", "directWhich", ("select", "query")),
    "shape": (shape, "query", "obj", "categoryThat", ("select", "query")),
    "count": (count, "query", "global", "countAll", ("select", "count")),
    "where": (where, "query", "attr", "positionQuery", ("select", "query")),
    "existence": (existence, "verify", "obj", "existAttr", ("select", "filter", "exist")),
    "relation": (relation, "verify", "rel", "relVerify", ("select", "select", "verify rel")),
    "hue_check": (hue_check, "verify", "attr", "verifyAttr", ("select", "filter", "exist")),
}


def write_gqa(folder: Path, rng: random.Random, items: int) -> int:
    """llava_gqa_testdev_balanced.jsonl, testdev_balanced_questions.json, images/."""
    lines, annotations = [], {}
    names = list(GQA_FAMILIES)
    for number in range(items):
        asker, *types, steps = GQA_FAMILIES[names[number % len(names)]]
        scene, asked = ask(rng, asker)
        image, qid = f"n{100001 + number}", f"{201307251 + number}"
        save_image(folder / "images" / f"{image}.jpg", draw(scene, rng))
        lines.append(loader_line(qid, f"{image}.jpg", asked))
        annotations[qid] = _gqa_annotation(qid, image, asked, types, steps)
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    write_json(folder / "testdev_balanced_questions.json", annotations)
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
