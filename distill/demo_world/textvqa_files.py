"""Demo world -> TextVQA v0.5.1 val: question files with and without OCR hints, annotations, pictures."""

from __future__ import annotations

import random
from pathlib import Path

from distill.demo_world.files import ask, loader_line, save_image, write_json, write_jsonl
from distill.demo_world.open_questions import hinted_word
from distill.demo_world.question import SHORT_ANSWER, Question
from distill.demo_world.scene import draw


def write_textvqa(folder: Path, rng: random.Random, items: int) -> int:
    """llava_textvqa_val_v051_ocr.jsonl and its twin without hints, TextVQA_0.5.1_val.json, train_images/."""
    with_hints, without, data = [], [], []
    for number in range(items):
        scene, asked = ask(rng, hinted_word, lambda question: question.reference is not None)
        image = f"{rng.getrandbits(64):016x}"
        save_image(folder / "train_images" / f"{image}.jpg", draw(scene, rng))
        with_hints.append(loader_line(image, f"{image}.jpg", asked))
        without.append(with_hints[-1] | {"text": asked.text + SHORT_ANSWER})
        data.append(_textvqa_entry(number, image, asked))
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", with_hints)
    write_jsonl(folder / "llava_textvqa_val_v051.jsonl", without)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", head | {"data": data})
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
