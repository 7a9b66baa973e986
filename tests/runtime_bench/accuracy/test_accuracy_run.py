"""A bundle that says "Yes" to everything: asked, written, resumed, cropped, scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import UsageError, VerificationError
from bundle.image import open_image, preprocess
from bundle.manifest import read_manifest, write_manifest
from bundle.prompt import build_prompt
from bundle.tokenizer import open_tokenizer
from runtime_bench.accuracy.answers import read_answers
from runtime_bench.accuracy.command import AccuracyConfig, ScoreConfig, accuracy, score
from runtime_bench.accuracy.questions import spread
from runtime_bench.accuracy.registry import BENCHMARKS
from runtime_bench.accuracy.score import BenchmarkName
from runtime_bench.result import read_results

ALWAYS_YES = {"gqa": 200 / 18, "sqa": 0.0, "textvqa": 100 / 23, "pope": 200 / 3, "mme": 500.0, "mmbench": 10.0}


@pytest.fixture
def config(bundle_folder: Path, scoring: Path, tmp_path: Path, runtime: object) -> AccuracyConfig:
    return AccuracyConfig(bundle=bundle_folder, data=scoring, output=tmp_path / "out/accuracy.json", json=True)


def test_all_six(config: AccuracyConfig, runtime: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy(config) == 0
    out = capsys.readouterr().out
    row = read_results(config.output)[0]
    assert row.accuracy is not None and row.bundle.name == "scripted" and row.runtime == "scripted 1.0"
    found = {name: result.score for name, result in row.accuracy.benchmarks.items()}
    assert found == pytest.approx(ALWAYS_YES, abs=1e-9)
    assert all(result.n_scored == result.n_expected for result in row.accuracy.benchmarks.values())
    assert runtime.questions == 19 + 24 + 23 + 36 + 84 + 36
    assert json.loads(out.splitlines()[-1])["row"] == json.loads(config.output.read_text(encoding="utf-8"))["rows"][0]


def test_answer_files_score_again_and_have_the_published_fields(config: AccuracyConfig, runtime: object) -> None:
    accuracy(config)
    answers = config.output.with_name("accuracy-answers")
    for name in BENCHMARKS:
        assert score(ScoreConfig(benchmark=name, data=config.data, answers=answers / f"{name}.jsonl")) == 0
        saved = json.loads((answers / f"{name}.score.json").read_text(encoding="utf-8"))
        again = BENCHMARKS[name].score(config.data, read_answers(answers / f"{name}.jsonl"))
        assert again.model_dump(mode="json") == saved
    fields = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    lines = {name: (answers / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("pope", "mmbench")}
    assert set(json.loads(lines["pope"][0])) == fields
    assert set(json.loads(lines["mmbench"][0])) == fields | {"round_id", "options", "option_char"}
    assert len({json.loads(line)["answer_id"] for line in lines["pope"]}) == 36


def test_a_stopped_run_goes_on(config: AccuracyConfig, runtime: Any) -> None:
    runtime.fail_after = 25
    with pytest.raises(KeyboardInterrupt):
        accuracy(config)
    assert not config.output.exists()
    answers = config.output.with_name("accuracy-answers")
    cut = answers / "sqa.jsonl"
    cut.write_text(cut.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    runtime.fail_after = None
    assert accuracy(config) == 0
    assert runtime.questions == 19 + 24 + 23 + 36 + 84 + 36 + 1, "only the line that was cut is asked again"
    assert len(cut.read_text(encoding="utf-8").splitlines()) == 24
    with pytest.raises(UsageError, match="exists already"):
        accuracy(config)


def test_answers_of_another_run_are_not_continued(config: AccuracyConfig, runtime: object) -> None:
    accuracy(config)
    config.output.unlink()
    manifest = config.bundle / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="holds answers of another bundle"):
        accuracy(config)


@pytest.mark.parametrize("sqa_image", ["crop", "pad"])
def test_picture_rule(config: AccuracyConfig, runtime: Any, scoring: Path, sqa_image: Any) -> None:
    """What the encoder sees is the picture through the rule itself, not through two resizes."""
    for name, strategy in (("sqa", sqa_image), ("pope", "pad")):
        runtime.pixels.clear()
        output = config.output.with_name(f"{name}.json")
        accuracy(AccuracyConfig(config.bundle, scoring, output, benchmarks=(name,), sqa_image=sqa_image))
        image = next(question.image for question in BENCHMARKS[name].questions(scoring) if question.image)
        spec = read_manifest(config.bundle).image.model_copy(update={"strategy": strategy})
        np.testing.assert_array_equal(runtime.pixels[0], preprocess(open_image(image), spec))


def test_missing_folder_is_skipped_only_when_not_asked_for(config: AccuracyConfig, data: Path, runtime: object) -> None:
    for name in ("gqa", "sqa", "textvqa", "mmbench"):
        shutil.rmtree(data / name)
    output = config.output
    assert accuracy(AccuracyConfig(config.bundle, data, output)) == 0
    row = read_results(output)[0]
    assert row.accuracy is not None and list(row.accuracy.benchmarks) == ["pope", "mme"]
    with pytest.raises(UsageError, match="has no llava_gqa"):
        accuracy(AccuracyConfig(config.bundle, data, output.with_name("two.json"), benchmarks=("gqa", "pope")))


def test_missing_picture_ends_before_anything_is_asked(config: AccuracyConfig, data: Path, runtime: Any) -> None:
    next((data / "pope/val2014").glob("*.jpg")).unlink()
    with pytest.raises(
        UsageError, match=r"pope: the pictures of \d+ questions do not exist; first: .*jpg of question_id"
    ):
        accuracy(AccuracyConfig(config.bundle, data, config.output))
    assert runtime.questions == 0 and not config.output.parent.exists()


def test_question_longer_than_the_context_is_an_empty_answer(config: AccuracyConfig, runtime: Any) -> None:
    manifest = read_manifest(config.bundle)
    tokenizer = open_tokenizer(manifest.tokenizer, config.bundle)
    texts = [question.text for question in BENCHMARKS["pope"].questions(config.data)]
    prompts = [build_prompt(manifest.prompt, tokenizer, manifest.tokenizer, text, True).token_ids for text in texts]
    rows = sorted(len(ids) - 1 + manifest.model.visual_tokens for ids in prompts)
    room = manifest.model.model_copy(update={"context_length": rows[20] + 1})
    write_manifest(config.bundle, manifest.model_copy(update={"model": room}))
    too_long = sum(count > rows[20] + 1 for count in rows)
    assert 0 < too_long < 36 and accuracy(AccuracyConfig(config.bundle, config.data, config.output, ("pope",))) == 0
    row = read_results(config.output)[0]
    assert row.accuracy is not None and runtime.questions == 36 - too_long
    warnings = row.accuracy.benchmarks["pope"].warnings
    assert any(f"{too_long} questions are longer than" in warning for warning in warnings)
    assert any("answers were cut off" in warning for warning in warnings)


def test_changed_bundle_is_refused(config: AccuracyConfig, runtime: object) -> None:
    (config.bundle / "text_decoder.bin").write_bytes(b"text_decodex")
    with pytest.raises(VerificationError, match="text_decoder.bin"):
        accuracy(config)


def test_limit_and_flags(config: AccuracyConfig, runtime: object, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy(AccuracyConfig(config.bundle, config.data, config.output, limit=28))
    row = read_results(config.output)[0]
    assert row.accuracy is not None
    mme = row.accuracy.benchmarks["mme"]
    assert mme.n_scored == 28 and mme.score == pytest.approx(500), "two questions of each of the 14 categories"
    assert row.accuracy.benchmarks["mmbench"].metrics["table"] == "mmbench_dev_en_20231003.tsv"
    assert "questions have no answer" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--limit is 0; it must be at least 1; --threads is -2"):
        AccuracyConfig(config.bundle, config.data, limit=0, threads=-2)


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
@pytest.mark.parametrize("limit", [1, 7, 1000, None])
def test_spread_keeps_groups_whole(scoring: Path, benchmark: BenchmarkName, limit: int | None) -> None:
    asked = BENCHMARKS[benchmark].questions(scoring)
    kept = spread(asked, limit)
    groups = {question.group for question in kept}
    assert kept == [question for question in asked if question.group in groups] and kept
    assert len(kept) == len(asked) if limit is None or limit > len(asked) else len(kept) <= limit + 4
