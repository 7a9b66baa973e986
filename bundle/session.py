"""Bundle directory -> Vlm: image and question in, answer and the times of its stages out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from PIL import Image

from bundle.errors import UsageError, VerificationError
from bundle.image import open_image, preprocess
from bundle.manifest import Manifest, read_manifest
from bundle.prefix import known_rows
from bundle.prompt import build_prompt, clean_answer, splice, text_ids
from bundle.runtimes.contract import Floats, Runtime
from bundle.runtimes.registry import open_runtime
from bundle.staging import inside
from bundle.tokenizer import Tokenizer, open_tokenizer

Picture = str | Path | bytes | Image.Image
Finish = Literal["eos", "max_new_tokens", "context"]


@dataclass
class StageTimes:
    """Wall time of each stage of one answer.

    Attributes:
        preprocess_ms: image file -> pixels, and question -> prompt ids.
        vision_encode_ms: pixels -> visual tokens.
        embed_ms: prompt ids -> embeddings, visual tokens spliced in.
        prefill_ms: the decoder's first call, on the prompt less what the prefix cache knows.
        first_token_ms: from the call to the first token's id; contains the four above.
        decode_ms: all later decoder calls, embedding included: ``new_tokens - 1`` of them.
        prompt_tokens: rows of the prompt, visual tokens included.
        known_tokens: of these, rows that came from the bundle's prefix cache and were not computed.
        new_tokens: tokens generated, an EOS included.
    """

    preprocess_ms: float = 0.0
    vision_encode_ms: float = 0.0
    embed_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    prompt_tokens: int = 0
    known_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: cleaned as the published evaluation does.
        token_ids: as generated, the EOS included.
        times: stage by stage.
        finish: why it ended; "context" means the KV cache was full.
    """

    text: str
    token_ids: tuple[int, ...]
    times: StageTimes
    finish: Finish


@dataclass
class _Run:
    """One answer while it is generated."""

    times: StageTimes = field(default_factory=StageTimes)
    token_ids: list[int] = field(default_factory=list)
    finish: Finish = "max_new_tokens"


class Vlm:
    """An opened bundle. One question at a time."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, runtime: Runtime) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.runtime = runtime

    def generate(self, image: Picture | None, question: str, max_new_tokens: int = 128) -> Answer:
        """Answer ``question`` about ``image`` (a path, bytes, a PIL picture, or None) by greedy decoding.

        Raises:
            UsageError: an unreadable image, an image marker in the question, or a prompt longer than the context.
        """
        run = _Run()
        for _ in self._tokens(run, image, question, max_new_tokens):
            pass
        text = clean_answer(self.tokenizer.decode(run.token_ids))
        return Answer(text, tuple(run.token_ids), run.times, run.finish)

    def stream(self, image: Picture | None, question: str, max_new_tokens: int = 128) -> Iterator[str]:
        """The same answer in pieces of text as they are generated, not cleaned; joined they are the decoded answer."""
        run, shown = _Run(), ""
        for _ in self._tokens(run, image, question, max_new_tokens):
            text = self.tokenizer.decode(run.token_ids)
            # a character may take several byte tokens; until it is whole it decodes to U+FFFD
            if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        rest = self.tokenizer.decode(run.token_ids).removeprefix(shown)
        if rest:
            yield rest

    def close(self) -> None:
        """Release the runtime's memory."""
        self.runtime.close()

    def __enter__(self) -> Vlm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokens(self, run: _Run, image: Picture | None, question: str, max_new_tokens: int) -> Iterator[int]:
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        start = time.perf_counter()
        rows = self._prompt_rows(run.times, image, question)  # [1, L, D]
        before = time.perf_counter()
        self.runtime.reset(run.times.known_tokens)
        token = int(self.runtime.decode(rows[:, run.times.known_tokens :]).argmax())
        run.times.prefill_ms = _ms_since(before)
        run.times.first_token_ms = _ms_since(start)
        while True:
            run.token_ids.append(token)
            run.times.new_tokens = len(run.token_ids)
            yield token
            if token in self.manifest.tokenizer.eos_ids:
                run.finish = "eos"
                return
            if len(run.token_ids) == max_new_tokens:
                return
            if self.runtime.position >= self.manifest.model.context_length:
                run.finish = "context"
                return
            before = time.perf_counter()
            token = int(self.runtime.decode(self.runtime.embed(np.array([[token]], dtype=np.int64))).argmax())
            run.times.decode_ms += _ms_since(before)

    def _prompt_rows(self, times: StageTimes, image: Picture | None, question: str) -> Floats:
        spec, image_id = self.manifest.tokenizer, self.manifest.tokenizer.image_token_id
        start = time.perf_counter()
        prompt = build_prompt(self.manifest.prompt, self.tokenizer, spec, question, image is not None)
        text = text_ids(prompt.token_ids, image_id)
        times.prompt_tokens = len(text) + (self.manifest.model.visual_tokens if image is not None else 0)
        self._check_context(times.prompt_tokens)
        times.known_tokens = known_rows(self.manifest, prompt.token_ids)
        pixels = None if image is None else preprocess(open_image(image), self.manifest.image)  # [1, 3, S, S]
        times.preprocess_ms = _ms_since(start)
        visual = None
        if pixels is not None:
            before = time.perf_counter()
            visual = self.runtime.encode_image(pixels)  # [1, N, D]
            times.vision_encode_ms = _ms_since(before)
        before = time.perf_counter()
        embeddings = self.runtime.embed(np.array([text], dtype=np.int64))  # [1, T, D]
        rows = splice(prompt.token_ids, image_id, embeddings, visual)  # [1, L, D]
        times.embed_ms = _ms_since(before)
        return rows

    def _check_context(self, prompt_tokens: int) -> None:
        model = self.manifest.model
        if prompt_tokens > model.context_length:
            raise UsageError(
                f"the prompt takes {prompt_tokens} tokens (an image takes {model.visual_tokens}), but the context of "
                f"bundle '{self.manifest.name}' holds {model.context_length}; shorten the question, or export again "
                "with a larger --context-length"
            )


def open_bundle(path: str | Path, threads: int | None = None, runtime: str | None = None) -> Vlm:
    """Open a bundle on this host.

    Args:
        path: the directory that alignkd-export wrote.
        threads: CPU threads of the engine; None leaves it to the engine.
        runtime: a name of bundle.runtimes.registry; None takes the first that can run here.

    Raises:
        UsageError: no bundle, or a manifest of the wrong shape or a newer version.
        VerificationError: a file is missing or truncated (alignkd-verify compares contents too).
        BackendMissingError: nothing on this host runs its target.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        file = inside(folder, name, "manifest path")
        size = file.stat().st_size if file.is_file() else None
        if size != record.size_bytes:
            state = "is missing" if size is None else f"has {size} bytes, the manifest says {record.size_bytes}"
            raise VerificationError(f"{folder}: file '{name}' {state}; copy or export the bundle again")
    return Vlm(manifest, open_tokenizer(manifest.tokenizer, folder), open_runtime(folder, manifest, threads, runtime))


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000.0
