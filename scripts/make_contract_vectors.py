"""Write tests/golden/contract: prompt, token and pixel vectors that the Python, Kotlin and Swift tests replay.

    python scripts/make_contract_vectors.py [OUTPUT]

Run it after a deliberate change of bundle/prompt.py, bundle/tokenizer.py or bundle/image.py, and say why in the commit.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bundle.image import normalise, open_image, resize
from bundle.manifest import ImageSpec, PromptSpec, TokenizerSpec
from bundle.prompt import TEMPLATES, build_prompt, clean_answer
from bundle.tokenizer import Tokenizer, open_tokenizer

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "tests/golden/contract"
TOKENIZER = "reference/student/tokenizer.model"  # under tests/golden
SPEC = TokenizerSpec(kind="sentencepiece", path=TOKENIZER, bos_id=1, eos_ids=(2,), pad_id=0)
# Hugging Face LLaVA: both kinds of tokenizer.json (trained by tests/export/hf_checkpoints.py), chat templates cut
CHATS: dict[str, tuple[TokenizerSpec, PromptSpec]] = {
    "bytes": (
        TokenizerSpec(
            kind="tokenizers", path="tokenizers/bytes.json", bos_id=None, eos_ids=(402,), pad_id=400, image_token_id=403
        ),
        PromptSpec(template="chat", prefix="<|im_start|>user\n", suffix="<|im_end|>\n<|im_start|>assistant\n"),
    ),
    "metaspace": (
        TokenizerSpec(
            kind="tokenizers", path="tokenizers/metaspace.json", bos_id=1, eos_ids=(2,), pad_id=3, image_token_id=4
        ),
        PromptSpec(template="chat", prefix="USER: ", suffix=" ASSISTANT:"),
    ),
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

QUESTIONS = (
    "What colour is the circle?",
    "Is there a red square in the picture?\nAnswer the question using a single word or phrase.",
    "Context: A  B\nWhich is left?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.",
    "",
    "  spaces  around  ",
    "Où est le café à 3 €? 图片里有什么 ☃ 👩‍🚀",
    "the text </s> and <s> and <unk> and < image > and <Image> stays text",
    "tab\there\r\nand a carriage return",
    "e\u0301 is e with a combining accent; ﬁ is a ligature; ｆｕｌｌ width",
)
TEXTS = (
    *QUESTIONS,
    "a red circle left of a blue square.\n",
    "\n",
    " ",
    "A",
    "yes",
    "\u00a0no-break\u200bzero-width",
    "0123456789",
)
ANSWERS = ("yes", " Yes. ", "no</s>", " no </s> ", "</s>", "a</s></s>", "", "the </s> inside", "line\n</s>\n")
BYTE_IDS = ([229, 155, 190], [229, 155], [13, 13], [1, 2, 0], [2])  # byte pieces are ids 3..258: not always whole UTF-8


def prompts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Both templates, with and without an image, each question."""
    cases = []
    for name, spec in TEMPLATES.items():
        for question in QUESTIONS:
            for has_image in (True, False):
                prompt = build_prompt(spec, tokenizer, SPEC, question, has_image)
                row = {"template": name, "question": question, "has_image": has_image}
                cases.append({**row, "text": prompt.text, "token_ids": list(prompt.token_ids)})
    templates = {name: spec.model_dump(mode="json") for name, spec in TEMPLATES.items()}
    return {"tokenizer": SPEC.model_dump(mode="json"), "templates": templates, "cases": cases}


def tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Texts -> ids -> text, single byte pieces, and the clean-up of answers."""
    encoded = [tokenizer.encode(text) for text in TEXTS]
    return {
        "tokenizer": SPEC.model_dump(mode="json"),
        "encode": [{"text": text, "ids": ids} for text, ids in zip(TEXTS, encoded, strict=True)],
        "decode": [{"ids": ids, "text": tokenizer.decode(ids)} for ids in [*encoded, *map(list, BYTE_IDS)]],
        "clean": [{"decoded": text, "answer": clean_answer(text)} for text in ANSWERS],
    }


def chats() -> dict[str, Any]:
    """Of each tokenizer.json: prompts of its chat template, questions that are refused, texts -> ids -> texts."""
    made = {}
    for name, (spec, template) in CHATS.items():
        tokenizer = open_tokenizer(spec, ROOT / "tests/golden")
        refused = [question for question in QUESTIONS if any(mark in question for mark in tokenizer.special_names)]
        cases = []
        for question in (question for question in QUESTIONS if question not in refused):
            for has_image in (True, False):
                prompt = build_prompt(template, tokenizer, spec, question, has_image)
                row = {"question": question, "has_image": has_image, "text": prompt.text}
                cases.append({**row, "token_ids": list(prompt.token_ids)})
        encoded = [tokenizer.encode(text) for text in TEXTS]
        made[name] = {
            "tokenizer": spec.model_dump(mode="json"),
            "template": template.model_dump(mode="json"),
            "prompts": cases,
            "refused": refused,
            "encode": [{"text": text, "ids": ids} for text, ids in zip(TEXTS, encoded, strict=True)],
            "decode": [{"ids": ids, "text": tokenizer.decode(ids)} for ids in [*encoded, [*encoded[0], *spec.eos_ids]]],
        }
    return made


def pictures() -> dict[str, Image.Image]:
    """Small inputs of odd sizes, one per Pillow mode that a PNG can hold."""
    made = {
        "rgb_wide": _picture(31, 17, 3),
        "rgb_tall": _picture(13, 40, 3),
        "rgb_square": _picture(24, 24, 3),
        "rgb_large": _picture(97, 61, 3),
        "rgb_line": _picture(9, 1, 3),
        "rgba": Image.fromarray(np.dstack([np.asarray(_picture(20, 15, 3)), np.asarray(_picture(20, 15, 1))])),
        "grey": _picture(15, 22, 1),
        "grey_alpha": _picture(18, 11, 1).convert("LA"),
        "palette": _picture(21, 16, 3).quantize(16),
        "one_bit": _picture(19, 23, 1).convert("1"),
        "grey_16": Image.fromarray(np.asarray(_picture(16, 14, 1)).astype(np.uint16) * 257),
    }
    pixel = Image.new("RGB", (1, 1), (10, 200, 30))
    return {**made, "rgb_pixel": pixel}


def _picture(width: int, height: int, channels: int) -> Image.Image:
    """Stripes and edges with a little structure in each channel; integers only, so it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        (x * (17 + 8 * c) + y * (29 - 6 * c) + (x * y) % (7 + c) * 11 + (x > width // 2) * 60) % 256 for c in range(3)
    ]
    return Image.fromarray(np.stack(planes[:channels], -1).astype(np.uint8).squeeze(-1 if channels == 1 else ()))


def pixels(folder: Path) -> dict[str, Any]:
    """Each picture by each strategy: the exact bytes after resizing, and the floats."""
    cases = []
    (folder / "pixels").mkdir(parents=True)
    for name, picture in pictures().items():
        source = f"pixels/{name}.png"
        picture.save(folder / source)
        rgb = open_image(folder / source)
        for strategy in ("pad", "crop", "stretch"):
            spec = ImageSpec(size=28 if name == "rgb_large" else 24, strategy=strategy, mean=CLIP_MEAN, std=CLIP_STD)
            square = resize(rgb, spec)
            resized = f"pixels/{name}_{strategy}.png"
            square.save(folder / resized)
            values = normalise(square, spec)[0]  # [3, S, S]
            cases.append(
                {
                    "input": source,
                    "rgb_sha256": hashlib.sha256(rgb.tobytes()).hexdigest(),
                    "spec": spec.model_dump(mode="json"),
                    "resized": resized,
                    "sum": float(values.astype(np.float64).sum()),
                    "sum_abs": float(np.abs(values.astype(np.float64)).sum()),
                    "every_7": [[[float(v) for v in row] for row in plane] for plane in values[:, ::7, ::7]],
                }
            )
    return {"cases": cases}


def write(folder: Path) -> None:
    """Write all four files and the pictures into ``folder``, which must not exist."""
    folder.mkdir(parents=True)
    tokenizer = open_tokenizer(SPEC, ROOT / "tests/golden")
    made = {"prompt": prompts(tokenizer), "tokens": tokens(tokenizer), "chat": chats(), "pixels": pixels(folder)}
    for name, content in made.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    if target.exists():
        sys.exit(f"error: {target} exists; remove it first")
    write(target)
