"""bundle.session on a numpy runtime: answers, streaming, EOS, the end of the context, times, bad input."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bundle.errors import BackendMissingError, UsageError, VerificationError
from bundle.golden import read_golden
from bundle.manifest import read_manifest
from bundle.session import open_bundle

QUESTION = "What colour is it?"


def test_the_answer_is_the_recorded_one(numpy_bundle: Path, picture: Image.Image) -> None:
    recording = read_golden(numpy_bundle, read_manifest(numpy_bundle))
    with open_bundle(numpy_bundle) as vlm:
        for case in recording.cases:
            answer = vlm.generate(None if case.image is None else picture, case.question, max_new_tokens=10)
            assert answer.token_ids == case.greedy_ids[:10]
            assert answer.text == vlm.tokenizer.decode(list(answer.token_ids)).strip()
            assert answer.finish == "max_new_tokens"
    assert vlm.runtime.closed  # type: ignore[attr-defined]


def test_path_bytes_and_picture_are_the_same_question(numpy_bundle: Path, tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "p.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    vlm = open_bundle(str(numpy_bundle))
    sources = (picture, tmp_path / "p.png", str(tmp_path / "p.png"), buffer.getvalue())
    assert len({vlm.generate(source, QUESTION, 6).token_ids for source in sources}) == 1
    assert vlm.generate(None, QUESTION, 6).token_ids != vlm.generate(picture, QUESTION, 6).token_ids


def test_a_question_does_not_remember_the_one_before(numpy_bundle: Path, picture: Image.Image) -> None:
    vlm = open_bundle(numpy_bundle)
    first = vlm.generate(picture, QUESTION, 6)
    vlm.generate(None, "Something else.", 6)
    assert vlm.generate(picture, QUESTION, 6).token_ids == first.token_ids


def test_streamed_pieces_join_to_the_answer(numpy_bundle: Path, picture: Image.Image) -> None:
    vlm = open_bundle(numpy_bundle)
    for question in (QUESTION, "Say yes.", "And now?"):
        pieces = list(vlm.stream(picture, question, 24))
        assert "".join(pieces).strip() == vlm.generate(picture, question, 24).text
        assert len(pieces) > 3


def test_a_character_of_several_byte_tokens_is_streamed_whole(
    numpy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = open_bundle(numpy_bundle)
    snowman = [*vlm.tokenizer.encode("a ☃ b")]
    script = iter(snowman)
    monkeypatch.setattr(vlm.runtime, "decode", lambda rows: np.eye(512, dtype=np.float32)[next(script)])
    pieces = list(vlm.stream(None, "?", len(snowman)))
    assert "".join(pieces) == "a ☃ b"
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 2


def test_eos_ends_the_answer(numpy_bundle: Path, rehash: Callable[..., None], picture: Image.Image) -> None:
    ids = open_bundle(numpy_bundle).generate(picture, QUESTION, 12).token_ids
    stop = ids[4]
    tokenizer = read_manifest(numpy_bundle).tokenizer.model_copy(update={"eos_ids": (2, stop)})
    rehash(numpy_bundle, tokenizer=tokenizer)
    answer = open_bundle(numpy_bundle).generate(picture, QUESTION, 12)
    assert answer.finish == "eos"
    assert answer.token_ids == ids[: ids.index(stop) + 1]
    assert answer.times.new_tokens == len(answer.token_ids)


def test_generation_stops_when_the_context_is_full(numpy_bundle: Path, picture: Image.Image) -> None:
    vlm = open_bundle(numpy_bundle)
    answer = vlm.generate(picture, QUESTION, 1000)
    context = vlm.manifest.model.context_length
    assert answer.finish == "context"
    assert answer.times.prompt_tokens + len(answer.token_ids) == context + 1  # the last token needs no row


def test_a_prompt_beyond_the_context_is_one_clear_error(numpy_bundle: Path, picture: Image.Image) -> None:
    vlm = open_bundle(numpy_bundle)
    with pytest.raises(UsageError, match=r"takes \d+ tokens .* context of bundle 'numpy-tiny' holds 160; shorten"):
        vlm.generate(picture, "why " * 200)


def test_times_of_the_stages(numpy_bundle: Path, picture: Image.Image) -> None:
    times = open_bundle(numpy_bundle).generate(picture, QUESTION, 5).times
    stages = (times.preprocess_ms, times.vision_encode_ms, times.embed_ms, times.prefill_ms)
    assert all(stage > 0 for stage in (*stages, times.decode_ms))
    assert sum(stages) <= times.first_token_ms < sum(stages) + 50
    assert times.new_tokens == 5 and times.prompt_tokens > 40
    assert open_bundle(numpy_bundle).generate(None, QUESTION, 1).times.vision_encode_ms == 0


def test_bad_questions_and_images(numpy_bundle: Path, tmp_path: Path) -> None:
    vlm = open_bundle(numpy_bundle)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        vlm.generate(None, QUESTION, 0)
    with pytest.raises(UsageError, match="gone.png does not exist"):
        vlm.generate(tmp_path / "gone.png", QUESTION)
    with pytest.raises(UsageError, match="holds '<image>'"):
        vlm.generate(None, "<image>")


def test_bundles_that_do_not_open(numpy_bundle: Path, numpy_module: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no bundle: it has no manifest.json"):
        open_bundle(tmp_path)
    with pytest.raises(UsageError, match="runtime 'tpu' does not run bundles for 'onnx'; allowed: numpy"):
        open_bundle(numpy_bundle, runtime="tpu")
    graph = numpy_bundle / "text_decoder.bin"
    content = graph.read_bytes()
    graph.write_bytes(content[:5])
    with pytest.raises(VerificationError, match="file 'text_decoder.bin' has 5 bytes"):
        open_bundle(numpy_bundle)
    graph.unlink()
    with pytest.raises(VerificationError, match="file 'text_decoder.bin' is missing"):
        open_bundle(numpy_bundle)
    graph.write_bytes(content)
    numpy_module.reason = "numpy is on holiday"
    with pytest.raises(BackendMissingError, match="no runtime on this host for target 'onnx' .*numpy is on holiday"):
        open_bundle(numpy_bundle)
