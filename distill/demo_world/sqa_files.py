"""Demo world -> ScienceQA test: LLaVA question file, problems, splits, pictures."""

from __future__ import annotations

import random
from pathlib import Path

from distill.demo_world.files import ask, save_image, write_json
from distill.demo_world.lessons import FAMILIES, text_conversation
from distill.demo_world.question import LETTERS, Question
from distill.demo_world.scene import draw

CONTEXT = "Context: "


def write_sqa(folder: Path, rng: random.Random, items: int) -> int:
    """llava_test_CQM-A.json, problems.json, pid_splits.json, images/test/<pid>/image.png; a fifth has no picture."""
    lines, problems = [], {}
    for number in range(items):
        pid = str(4 + 3 * number)
        with_image = number % 5 != 4
        if with_image:
            scene, asked = ask(rng, FAMILIES["choice"][1])
            save_image(folder / "images" / "test" / pid / "image.png", draw(scene, rng))
        else:
            asked = text_conversation(rng, 1)[0]
        marker = "<image>\n" if with_image else ""
        turns = [{"from": "human", "value": marker + asked.body}, {"from": "gpt", "value": asked.answer}]
        lines.append({"id": pid} | ({"image": f"{pid}/image.png"} if with_image else {}) | {"conversations": turns})
        problems[pid] = _sqa_problem(asked, with_image)
    write_json(folder / "llava_test_CQM-A.json", lines)
    write_json(folder / "problems.json", problems)
    splits: dict[str, list[str]] = {name: [] for name in ("train", "val", "minival", "minitest")}
    write_json(folder / "pid_splits.json", splits | {"test": list(problems)})
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
