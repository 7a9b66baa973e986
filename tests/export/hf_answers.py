"""What transformers answers with a checkpoint's own processor, and what a bundle of it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bundle.image import preprocess
from bundle.prompt import build_prompt, splice, text_ids
from bundle.replay import relative_error
from bundle.runtimes.contract import Floats
from bundle.session import Vlm, open_bundle

TOKENS = 12
QUESTIONS = ("What colour is the circle?", "Où est le 1er café à 3 €?\nYes / no?")


def picture() -> Image.Image:
    """Noise of an odd size, so that every pixel of the resizing shows."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 61, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Said:
    """One answer.

    Attributes:
        prompt_ids: the image id once for each visual token.
        logits: [tokens, V], row by row as each token was chosen.
    """

    prompt_ids: list[int]
    pixels: Floats | None
    token_ids: list[int]
    logits: Floats
    text: str


@torch.no_grad()
def transformers_says(checkpoint: Path, question: str, image: Image.Image | None) -> Said:
    """By AutoProcessor, its chat template and ``generate``."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    shown = [] if image is None else [{"type": "image"}]
    message = {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs: Any = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    prompt = inputs["input_ids"][0].tolist()
    said = out.sequences[0, len(prompt) :].tolist()
    return Said(
        prompt,
        None if image is None else inputs["pixel_values"].numpy(),
        said,
        torch.cat(out.logits).numpy(),
        processor.decode(said, skip_special_tokens=True).strip(),
    )


def bundle_says(vlm: Vlm, question: str, image: Image.Image | None) -> Said:
    """By the session, and again step by step for the logits."""
    answer, spec = vlm.generate(image, question, max_new_tokens=TOKENS), vlm.manifest.tokenizer
    prompt = build_prompt(vlm.manifest.prompt, vlm.tokenizer, spec, question, image is not None)
    pixels = None if image is None else preprocess(image, vlm.manifest.image)
    runtime, image_id = vlm.runtime, spec.image_token_id
    runtime.reset()
    text = runtime.embed(np.array([text_ids(prompt.token_ids, image_id)]))
    visual = None if pixels is None else runtime.encode_image(pixels)
    logits = [runtime.decode(splice(prompt.token_ids, image_id, text, visual))]
    logits += [runtime.decode(runtime.embed(np.array([[token]]))) for token in answer.token_ids[:-1]]
    spread = [i for i in prompt.token_ids for _ in range(vlm.manifest.model.visual_tokens if i == image_id else 1)]
    return Said(spread, pixels, list(answer.token_ids), np.stack(logits), answer.text)


def assert_same_answers(checkpoint: Path, bundle: Path, logit_error: float = 2e-5) -> None:
    """Prompt ids, pixels, tokens, logits and text, with a picture and without."""
    with_image, text_alone = QUESTIONS
    vlm = open_bundle(bundle, threads=1)
    for question, image in ((with_image, picture()), (text_alone, picture()), (text_alone, None)):
        wanted, found = transformers_says(checkpoint, question, image), bundle_says(vlm, question, image)
        assert found.prompt_ids == wanted.prompt_ids
        if wanted.pixels is not None and found.pixels is not None:
            np.testing.assert_allclose(found.pixels, wanted.pixels, atol=1e-6)
        assert relative_error(found.logits, wanted.logits) < logit_error
        assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
