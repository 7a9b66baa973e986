"""Manifest + settings -> the fixed work of one repeat: a picture, a prompt of N rows, M greedy tokens, all timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bundle.errors import UsageError
from bundle.image import preprocess
from bundle.manifest import Manifest
from bundle.prefix import known_rows
from bundle.prompt import build_prompt, splice, text_ids
from bundle.runtimes.contract import Floats, Ids, Runtime
from bundle.tokenizer import Tokenizer
from runtime_bench.result import Quantity

QUESTION = "What is in the picture?"
PICTURE_SIZE = (640, 480)  # a common camera preview; larger pictures cost more in preprocess_ms and nowhere else
PICTURE = f"made, {PICTURE_SIZE[0]}x{PICTURE_SIZE[1]} RGB, smooth colours with seeded noise"


@dataclass(frozen=True)
class Workload:
    """What every repeat does.

    Attributes:
        picture: RGB, decoded.
        token_ids: the prompt with the image id once, ``prompt_tokens`` rows long once the image is spliced in.
        prompt_tokens: rows of the prompt, visual tokens included.
        known_tokens: of these, rows that the bundle's prefix cache holds.
        new_tokens: greedy tokens, going on past the end of the answer so that every repeat does the same work.
    """

    picture: Image.Image
    token_ids: tuple[int, ...]
    prompt_tokens: int
    known_tokens: int
    new_tokens: int


def make_picture() -> Image.Image:
    """The same RGB picture on every machine."""
    width, height = PICTURE_SIZE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    smooth = np.stack([x / width, y / height, 1 - (x + y) / (width + height)], axis=-1) * 200  # [H, W, 3]
    noise = np.random.default_rng(0).uniform(0, 55, smooth.shape)
    return Image.fromarray((smooth + noise).astype(np.uint8))


def make_workload(
    manifest: Manifest, tokenizer: Tokenizer, prompt_tokens: int | None = None, new_tokens: int = 32
) -> Workload:
    """Build the prompt of the asked length by repeating the question's ids, or take the template's own length.

    Raises:
        UsageError: the prompt is shorter than the template and the image, or does not fit the KV cache.
    """
    ids = build_prompt(manifest.prompt, tokenizer, manifest.tokenizer, QUESTION, has_image=True).token_ids
    natural = len(ids) - 1 + manifest.model.visual_tokens
    wanted = natural if prompt_tokens is None else prompt_tokens
    if wanted < natural:
        raise UsageError(
            f"--prompt-tokens {wanted} is too short for {manifest.name}: template and image take {natural}; "
            f"allowed: {natural}..{manifest.model.context_length - new_tokens + 1}"
        )
    if wanted + new_tokens - 1 > manifest.model.context_length:
        raise UsageError(
            f"{manifest.name}: {wanted} prompt tokens and {new_tokens} new ones do not fit its context of "
            f"{manifest.model.context_length}; lower --new-tokens or --prompt-tokens, or export with a longer context"
        )
    image_at = ids.index(manifest.tokenizer.image_token_id)
    question = tokenizer.encode(QUESTION)
    filler = (question * (wanted // len(question) + 1))[: wanted - natural]
    longer = (*ids[: image_at + 1], *filler, *ids[image_at + 1 :])
    return Workload(make_picture(), longer, wanted, known_rows(manifest, longer), new_tokens)


def run_once(
    runtime: Runtime, manifest: Manifest, tokenizer: Tokenizer, work: Workload, clock_ns: Callable[[], int]
) -> dict[Quantity, float]:
    """One repeat from an empty KV cache: every stage of the time to first token, then the decode steps.

    A bundle with a prefix cache starts from it, and prefills the whole prompt once more for comparison.
    """
    runtime.reset(work.known_tokens)
    marks = [clock_ns()]
    pixels = preprocess(work.picture, manifest.image)  # [1, 3, S, S]
    marks.append(clock_ns())
    build_prompt(manifest.prompt, tokenizer, manifest.tokenizer, QUESTION, has_image=True)
    marks.append(clock_ns())
    visual = runtime.encode_image(pixels)  # [1, N, D]
    marks.append(clock_ns())
    inputs = _prompt_rows(runtime, work.token_ids, visual, manifest.tokenizer.image_token_id)  # [1, T, D]
    marks.append(clock_ns())
    logits = runtime.decode(inputs[:, work.known_tokens :])  # [V]
    marks.append(clock_ns())
    token = int(logits.argmax())
    marks.append(clock_ns())
    for _ in range(work.new_tokens - 1):
        logits = runtime.decode(runtime.embed(_ids([token])))  # [V]
        token = int(logits.argmax())
    decode_ms = (clock_ns() - marks[-1]) / 1e6
    stages_ms = [(after - before) / 1e6 for before, after in zip(marks, marks[1:], strict=False)]
    found = _quantities(stages_ms, decode_ms, work)
    if work.known_tokens:
        runtime.reset()
        start = clock_ns()
        runtime.decode(inputs)
        found["ttft_whole_prefill_ms"] = found["ttft_ms"] - found["prefill_ms"] + (clock_ns() - start) / 1e6
    return found


def _quantities(stages_ms: list[float], decode_ms: float, work: Workload) -> dict[Quantity, float]:
    preprocess_ms, prompt_ms, vision_ms, embed_ms, prefill_ms, first_ms = stages_ms
    steps = work.new_tokens - 1
    return {
        "preprocess_ms": preprocess_ms,
        "prompt_ms": prompt_ms,
        "vision_encode_ms": vision_ms,
        "embed_ms": embed_ms,
        "prefill_ms": prefill_ms,
        "first_token_ms": first_ms,
        "ttft_ms": sum(stages_ms),
        "prefill_tokens_per_s": 1e3 * (work.prompt_tokens - work.known_tokens) / prefill_ms,
        "decode_ms_per_token": decode_ms / steps,
        "decode_tokens_per_s": 1e3 * steps / decode_ms,
    }


def _prompt_rows(runtime: Runtime, token_ids: tuple[int, ...], visual: Floats, image_token_id: int) -> Floats:
    text = runtime.embed(_ids(text_ids(token_ids, image_token_id)))  # [1, T_text, D]
    return splice(token_ids, image_token_id, text, visual)  # [1, T, D]


def _ids(ids: list[int]) -> Ids:
    return np.asarray([ids], dtype=np.int64)
