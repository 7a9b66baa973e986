"""A few conversations on the built-in pictures, as a data set on disk."""

from __future__ import annotations

import json
from pathlib import Path

from export.golden.record import picture

QUESTIONS = ("What colour is the circle?", "How many shapes are there?", "Is there a red square?")
ANSWERS = ("The circle is red.", "There are four of them.", "No, there is not.")


def write_set(folder: Path, rows: int = 6) -> Path:
    """``rows`` conversations, every third without a picture; two questions each."""
    found = []
    for name in ("wide", "tall"):
        picture(name).save(folder / f"{name}.png")
    for number in range(rows):
        first, second = QUESTIONS[number % 3], QUESTIONS[(number + 1) % 3]
        turns = [(first, ANSWERS[number % 3]), (second, ANSWERS[(number + 1) % 3])]
        row: dict[str, object] = {"id": str(number)}
        if number % 3 != 2:
            row["image"] = f"{('wide', 'tall')[number % 2]}.png"
            turns[0] = (f"<image>\n{first}", turns[0][1])
        row["conversations"] = [
            message
            for question, answer in turns
            for message in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]
        found.append(row)
    path = folder / "rows.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path
