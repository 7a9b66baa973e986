"""Two bundles and questions -> how far they agree: per stage, per answer token, and where they part first.

The first bundle answers by itself; the second is fed the first one's tokens, so that every position is a fair question
to both, and answers by itself as well where they differ. Targets and precisions may differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bundle.agreement import Agreement, ComparedStage, Comparison, Divergence, divergence_of
from bundle.compare_cases import Question, golden_questions, questions_of, refuse_unlike
from bundle.errors import UsageError
from bundle.image import open_image, preprocess
from bundle.manifest import Manifest, check_files, read_manifest
from bundle.prompt import build_prompt, splice, text_ids
from bundle.replay import relative_error
from bundle.runtimes.contract import Floats, Runtime
from bundle.runtimes.registry import open_runtime
from bundle.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class _Inputs:
    """What a bundle makes of a question before its decoder."""

    visual_tokens: Floats | None  # [1, N, D]
    embeddings: Floats  # [1, T, D]
    rows: Floats  # [1, T + N, D]


class _Side:
    """One opened bundle."""

    def __init__(self, bundle: Path, manifest: Manifest, runtime: str | None) -> None:
        self.manifest = manifest
        self.tokenizer: Tokenizer = open_tokenizer(manifest.tokenizer, bundle)
        self.runtime: Runtime = open_runtime(bundle, manifest, None, runtime)

    def inputs(self, question: Question) -> _Inputs:
        spec, manifest = self.manifest.tokenizer, self.manifest
        prompt = build_prompt(manifest.prompt, self.tokenizer, spec, question.text, question.image is not None)
        visual = None
        if question.image is not None:
            visual = self.runtime.encode_image(preprocess(open_image(question.image), manifest.image))
        ids = np.array([text_ids(prompt.token_ids, spec.image_token_id)], dtype=np.int64)
        embeddings = self.runtime.embed(ids)
        return _Inputs(visual, embeddings, splice(prompt.token_ids, spec.image_token_id, embeddings, visual))

    def logits(self, rows: Floats, limit: int, fed: Sequence[int] | None = None) -> Floats:
        """Up to ``limit`` next-token logits [n, V] behind a prompt; ``fed`` None feeds the most likely token.

        By itself a bundle stops behind an end mark.
        """
        self.runtime.reset()
        found = [self.runtime.decode(rows)]
        while len(found) < limit:
            token = int(found[-1].argmax()) if fed is None else fed[len(found) - 1]
            if fed is None and token in self.manifest.tokenizer.eos_ids:
                break
            found.append(self.runtime.decode(self.runtime.embed(np.array([[token]], dtype=np.int64))))
        return np.stack(found)


def compare_bundles(
    first: Path,
    second: Path,
    runtime: str | None = None,
    cases: Path | None = None,
    max_new_tokens: int = 32,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Ask two bundles the same questions; one is open at a time.

    Args:
        runtime: a name of bundle.runtimes.registry for both; None takes the first that can run here for each.
        cases: JSON lines of questions; None takes the golden ones of both.

    Raises:
        UsageError: no bundle, a file of questions that cannot be used, or a prompt longer than a context.
        VerificationError: a file of a bundle is missing or changed.
        NotComparableError: the two have other vocabularies, prompts or image rules.
        BackendMissingError: nothing on this host runs one of them.
    """
    manifests = (read_manifest(first), read_manifest(second))
    for bundle, manifest in zip((first, second), manifests, strict=True):
        check_files(bundle, manifest)
    refuse_unlike((str(first), str(second)), manifests)
    questions = golden_questions((first, second), manifests) if cases is None else questions_of(cases)
    with tempfile.TemporaryDirectory(prefix="alignkd-compare-") as folder:
        kept = [Path(folder) / f"{index}.npz" for index in range(len(questions))]
        side = _Side(first, manifests[0], runtime)
        try:
            for question, file in zip(questions, kept, strict=True):
                limit = _limit(question, side, manifests, max_new_tokens)
                _answer(side, question, limit, file)
                progress(f"{first.name} answered {question.name}")
        finally:
            side.runtime.close()
        names = [side.runtime.name]
        side = _Side(second, manifests[1], runtime)
        try:
            found = []
            for question, file in zip(questions, kept, strict=True):
                found.append(_agreement(side, question, file))
                progress(f"{second.name} answered {question.name}")
        finally:
            side.runtime.close()
        names.append(side.runtime.name)
    return Comparison((names[0], names[1]), tuple(found))


def _limit(question: Question, side: _Side, manifests: Iterable[Manifest], max_new_tokens: int) -> int:
    """Answer tokens that fit into the smaller context."""
    spec = side.manifest.tokenizer
    prompt = build_prompt(side.manifest.prompt, side.tokenizer, spec, question.text, question.image is not None)
    text = len(text_ids(prompt.token_ids, spec.image_token_id))
    room = [
        manifest.model.context_length - text - (0 if question.image is None else manifest.model.visual_tokens)
        for manifest in manifests
    ]
    if min(room) < 0:
        raise UsageError(
            f"the prompt of {question.name} is {-min(room)} tokens longer than a bundle's context; shorten it, or "
            "export again with a larger --context-length"
        )
    return min(max_new_tokens, min(room) + 1)


def _answer(side: _Side, question: Question, limit: int, file: Path) -> None:
    """The first bundle's answer, kept on disk: logits of a large vocabulary are megabytes a question."""
    inputs = side.inputs(question)
    logits = side.logits(inputs.rows, limit)
    visual = np.zeros(0, np.float32) if inputs.visual_tokens is None else inputs.visual_tokens
    np.savez(file, logits=logits, embeddings=inputs.embeddings, visual_tokens=visual)


def _agreement(side: _Side, question: Question, file: Path) -> Agreement:
    inputs = side.inputs(question)
    with np.load(file) as kept:
        first: Floats = kept["logits"]  # [n, V]
        tokens = [int(token) for token in first.argmax(-1)]
        second = side.logits(inputs.rows, len(first), fed=tokens)  # [n, V]
        pairs: dict[ComparedStage, tuple[Floats, Floats]] = {
            "embeddings": (inputs.embeddings, kept["embeddings"]),
            "first_logits": (second[0], first[0]),
            "answer_logits": (second, first),
        }
        if inputs.visual_tokens is not None:
            pairs["visual_tokens"] = (inputs.visual_tokens, kept["visual_tokens"])
    others = [int(token) for token in second.argmax(-1)]
    parted = next((at for at, (left, right) in enumerate(zip(tokens, others, strict=True)) if left != right), None)
    return Agreement(
        question=question,
        tokens=len(tokens),
        agreed=sum(left == right for left, right in zip(tokens, others, strict=True)),
        matched=len(tokens) if parted is None else _matched(side, inputs.rows, tokens),
        kl=tuple(float(value) for value in divergence_of(first, second)),
        errors={stage: relative_error(*pair) for stage, pair in pairs.items() if pair[0].shape == pair[1].shape},
        divergence=None if parted is None else _divergence(side, question, first[parted], second[parted], parted),
    )


def _matched(side: _Side, rows: Floats, tokens: list[int]) -> int:
    """Tokens at the same place in the second bundle's own answer."""
    own = side.logits(rows, len(tokens)).argmax(-1)
    return sum(int(left) == right for left, right in zip(own, tokens, strict=False))


def _divergence(side: _Side, question: Question, first: Floats, second: Floats, position: int) -> Divergence:
    tokens = (int(first.argmax()), int(second.argmax()))
    last = side.tokenizer.vocab_size - 1  # a model may have more rows than its tokenizer has pieces
    return Divergence(
        question=question.name,
        position=position,
        tokens=tokens,
        pieces=(side.tokenizer.decode([min(tokens[0], last)]), side.tokenizer.decode([min(tokens[1], last)])),
        margins=(float(first[tokens[0]] - first[tokens[1]]), float(second[tokens[1]] - second[tokens[0]])),
    )
