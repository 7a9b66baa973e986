"""Opened runtime and golden vectors -> the error of each stage against both sets of vectors, worst golden case.

Each stage is fed the golden output of the stage before it, so an error shows where it arises and nowhere later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bundle.golden import GoldenCase, Recording, Vector
from bundle.image import open_image, preprocess
from bundle.manifest import STAGES, Manifest, Stage, VectorSet
from bundle.prompt import build_prompt, splice, text_ids
from bundle.runtimes.contract import Floats, Runtime
from bundle.staging import inside
from bundle.tokenizer import open_tokenizer

# Noise of the tolerated size (tolerance x rms of the logits) flips the top token only where its margin is a few times
# smaller than this; a token that was surer than that must be the same.
SURE_MARGIN = 8.0
SMALLEST_NORM = 1e-30  # keeps the error of an all-zero reference finite
SHOWN_CHARACTERS = 24
Plain = Literal["visual_tokens", "embeddings", "first_logits"]  # stages whose vector has their name


@dataclass(frozen=True)
class Measured:
    """One comparison: relative L2 error (0 or 1 for the prompt), and where in the golden cases."""

    error: float
    where: str


@dataclass
class Replay:
    """What one runtime makes of the golden cases.

    Attributes:
        graph: the runtime against the model with the weights that the files hold.
        total: the runtime against the checkpoint in float32.
        agreed: decoder rows whose most likely token is the checkpoint's.
        rows: decoder rows compared.
    """

    graph: dict[Stage, Measured] = field(default_factory=dict)
    total: dict[Stage, Measured] = field(default_factory=dict)
    agreed: int = 0
    rows: int = 0

    def add(self, stage: Stage, graph: Measured, total: Measured) -> None:
        """Keep the worst of each stage."""
        for worst, found in ((self.graph, graph), (self.total, total)):
            if stage not in worst or not found.error <= worst[stage].error:
                worst[stage] = found


def replay(runtime: Runtime, manifest: Manifest, golden: Recording, tolerances: Mapping[Stage, float]) -> Replay:
    """Run every golden case.

    Args:
        tolerances: of the stages; that of the greedy tokens says which tokens are sure.
    """
    found = Replay()
    for case in golden.cases:
        _prompt(found, manifest, golden, case)
        if case.image is not None:
            _image(found, runtime, manifest, golden, case)
        _text(found, runtime, manifest, golden, case)
        _greedy(found, runtime, golden, case, tolerances["greedy_tokens"])
    return found


def quantization_errors(golden: Recording) -> dict[Stage, Measured]:
    """The weights that the files hold against the checkpoint's, both in torch: no runtime is needed."""
    worst: dict[Stage, Measured] = {stage: Measured(0.0, "") for stage in STAGES}
    for case in golden.cases:
        for stage, name in _vectors(case):
            pair: list[Floats] = [golden.vector(case, name, of) for of in ("dequantized", "float")]
            rows = zip(*pair, strict=True) if name == "greedy_logits" else [pair]
            for step, (dequantized, wanted) in enumerate(rows):
                error = relative_error(dequantized, wanted)
                if not error <= worst[stage].error:
                    worst[stage] = Measured(error, _place(case, step if name == "greedy_logits" else None))
    return worst


def relative_error(found: Floats, wanted: Floats) -> float:
    """L2 norm of the difference over that of ``wanted``; infinite for another shape or values that are no numbers."""
    if found.size != wanted.size:
        return float("inf")
    reference = wanted.astype(np.float64).ravel()
    difference = float(np.linalg.norm(found.astype(np.float64).ravel() - reference))
    if not np.isfinite(difference):
        return float("inf")
    return difference / max(float(np.linalg.norm(reference)), SMALLEST_NORM)


def _vectors(case: GoldenCase) -> Iterator[tuple[Stage, Vector]]:
    if case.image is not None:
        yield "visual_tokens", "visual_tokens"
    yield "embeddings", "embeddings"
    yield "first_logits", "first_logits"
    yield "greedy_tokens", "greedy_logits"


def _place(case: GoldenCase, step: int | None = None) -> str:
    return f"case '{case.name}'" + ("" if step is None else f", answer token {step}")


def _prompt(found: Replay, manifest: Manifest, golden: Recording, case: GoldenCase) -> None:
    tokenizer = open_tokenizer(manifest.tokenizer, golden.bundle)
    prompt = build_prompt(manifest.prompt, tokenizer, manifest.tokenizer, case.question, case.image is not None)
    where, error = _place(case), 0.0
    if prompt.text != case.prompt_text:
        at = next(
            (at for at, pair in enumerate(zip(prompt.text, case.prompt_text, strict=False)) if pair[0] != pair[1]),
            min(len(prompt.text), len(case.prompt_text)),
        )
        shown = [repr(text[at : at + SHOWN_CHARACTERS]) for text in (prompt.text, case.prompt_text)]
        where, error = f"{where}, character {at}: {shown[0]} here, {shown[1]} recorded", 1.0
    elif prompt.token_ids != case.token_ids:
        pairs = zip(prompt.token_ids, case.token_ids, strict=False)
        at = next((at for at, (here, recorded) in enumerate(pairs) if here != recorded), len(prompt.token_ids))
        where, error = f"{where}, same text, other token ids from the {at}th on", 1.0
    found.add("prompt", Measured(error, where), Measured(error, where))


def _image(found: Replay, runtime: Runtime, manifest: Manifest, golden: Recording, case: GoldenCase) -> None:
    assert case.image is not None
    pixels = golden.vector(case, "pixels")  # [1, 3, S, S]
    here = preprocess(open_image(inside(golden.bundle, case.image, "golden image")), manifest.image)
    same = Measured(relative_error(here, pixels), _place(case))
    found.add("pixels", same, same)
    _compare(found, "visual_tokens", runtime.encode_image(pixels), golden, case)  # [1, N, D]


def _text(found: Replay, runtime: Runtime, manifest: Manifest, golden: Recording, case: GoldenCase) -> None:
    image_id = manifest.tokenizer.image_token_id
    embeddings = golden.vector(case, "embeddings")  # [1, T, D]
    visual = golden.vector(case, "visual_tokens") if case.image is not None else None
    ids = np.array([text_ids(case.token_ids, image_id)], dtype=np.int64)  # [1, T]
    _compare(found, "embeddings", runtime.embed(ids), golden, case)
    runtime.reset()
    first = runtime.decode(splice(case.token_ids, image_id, embeddings, visual))  # [V]
    _compare(found, "first_logits", first, golden, case)
    _count(found, first, golden, case, 0)


def _greedy(found: Replay, runtime: Runtime, golden: Recording, case: GoldenCase, tolerance: float) -> None:
    """Steps after the prefill, each fed the golden token before it; a sure token that changes is an error of 1."""
    sets: dict[VectorSet, Floats] = {of: golden.vector(case, "greedy_logits", of) for of in golden.sets}  # [32, V]
    for step in range(1, len(case.greedy_ids)):
        previous = np.array([[case.greedy_ids[step - 1]]], dtype=np.int64)
        logits = runtime.decode(runtime.embed(previous))  # [V]
        wanted = sets["dequantized"][step]
        error = relative_error(logits, wanted)
        if logits.argmax() != wanted.argmax() and _is_sure(wanted, tolerance):
            error = max(error, 1.0)
        where = _place(case, step)
        found.add("greedy_tokens", Measured(error, where), Measured(relative_error(logits, sets["float"][step]), where))
        _count(found, logits, golden, case, step)


def _compare(found: Replay, stage: Plain, output: Floats, golden: Recording, case: GoldenCase) -> None:
    graph, total = (relative_error(output, golden.vector(case, stage, of)) for of in ("dequantized", "float"))
    found.add(stage, Measured(graph, _place(case)), Measured(total, _place(case)))


def _count(found: Replay, logits: Floats, golden: Recording, case: GoldenCase, step: int) -> None:
    found.rows += 1
    found.agreed += int(logits.argmax() == golden.vector(case, "greedy_logits", "float")[step].argmax())


def _is_sure(logits: Floats, tolerance: float) -> bool:
    second, first = np.partition(logits, -2)[-2:]
    rms = float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))
    return float(first - second) > SURE_MARGIN * tolerance * rms
