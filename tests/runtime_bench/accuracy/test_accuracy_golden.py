"""Every recorded verdict of the published scripts: parsers, items, scores and sub-numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_bench.accuracy import gqa, mmbench, mme, pope, sqa, textvqa
from runtime_bench.accuracy.answers import read_answers
from runtime_bench.accuracy.command import ScoreConfig, score
from runtime_bench.accuracy.registry import BENCHMARKS
from runtime_bench.accuracy.score import BenchmarkName, Score

CASES: list[tuple[BenchmarkName, str]] = [
    ("gqa", "main"), ("gqa", "perfect"), ("sqa", "main"), ("sqa", "perfect"), ("textvqa", "main"),
    ("textvqa", "missing"), ("pope", "main"), ("pope", "perfect"), ("mme", "main"), ("mme", "perfect"),
    ("mmbench", "forms"), ("mmbench", "perfect"),
]  # fmt: skip
PRINTED = 0.005  # half a unit of the last digit that the published scripts print


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def expected(scoring: Path, benchmark: str, case: str) -> dict[str, Any]:
    return json.loads((scoring / benchmark / "expected.json").read_text(encoding="utf-8"))[case]


def scored(scoring: Path, benchmark: BenchmarkName, case: str) -> Score:
    kind = "predictions" if benchmark == "mmbench" else "answers"
    return BENCHMARKS[benchmark].score(scoring, read_answers(scoring / benchmark / f"{kind}_{case}.jsonl"))


def test_sqa_parser(scoring: Path) -> None:
    for case in records(scoring / "sqa/parser_expected.jsonl"):
        choice = sqa.parse(case["text"], case["n_choices"])
        assert (choice, choice.pred_idx) == (case["official_letter"], case["official_idx"]), case


def test_pope_parser(scoring: Path) -> None:
    for case in records(scoring / "pope/parser_expected.jsonl"):
        assert pope.parse(case["text"]) == case["official"], case


def test_mme_parser(scoring: Path) -> None:
    for case in records(scoring / "mme/parser_expected.jsonl"):
        assert mme.parse(case["text"]) == case["official"], case


def test_mmbench_parser(scoring: Path) -> None:
    for case in records(scoring / "mmbench/parser_expected.jsonl"):
        before = dict(case["choices"])
        assert mmbench.parse(case["text"], case["choices"]) == case["vlmevalkit"], case
        assert case["choices"] == before, "a pure parser leaves its arguments alone"


def test_textvqa_processor(scoring: Path) -> None:
    for case in records(scoring / "textvqa/processor_expected.jsonl"):
        assert textvqa.normalize(case["raw"]) == case["official"], case


@pytest.mark.parametrize("case", ["main", "perfect"])
def test_gqa(scoring: Path, case: str) -> None:
    truth, result = expected(scoring, "gqa", case), scored(scoring, "gqa", case)
    assert {item["question_id"]: item["score"] for item in result.items} == truth["per_item"]
    converted = {line["questionId"]: line["prediction"] for line in truth["converted"]}
    assert {item["question_id"]: item["prediction"] for item in result.items} == converted
    for line in records(scoring / f"gqa/answers_{case}.jsonl"):
        assert gqa.normalize(line["text"]) == converted[line["question_id"]]
    for name, value in truth["official"].items():
        assert result.metrics[name] == pytest.approx(value, abs=PRINTED), name
    assert result.score == result.metrics["accuracy"] and (result.n_scored, result.n_expected) == (18, 18)


@pytest.mark.parametrize("case", ["main", "perfect"])
def test_sqa(scoring: Path, case: str) -> None:
    truth, result = expected(scoring, "sqa", case), scored(scoring, "sqa", case)
    items = {item["question_id"]: item for item in result.items}
    for line in truth["per_item"]:
        assert {key: items[line["question_id"]][key] for key in line} == line
    assert result.score == pytest.approx(truth["official"]["img_accuracy"], abs=PRINTED)
    assert result.metrics["img_accuracy_official"] == pytest.approx(truth["official"]["img_accuracy"], abs=PRINTED)
    assert result.metrics["accuracy"] == pytest.approx(truth["official"]["accuracy"], abs=PRINTED)
    assert (result.metrics["total"], result.metrics["correct"]) == (24, truth["official"]["correct"])


@pytest.mark.parametrize("case", ["main", "missing"])
def test_textvqa(scoring: Path, case: str) -> None:
    truth, result = expected(scoring, "textvqa", case), scored(scoring, "textvqa", case)
    assert [{key: item[key] for key in truth["per_item"][0]} for item in result.items] == truth["per_item"]
    assert result.score == pytest.approx(100 * truth["accuracy_exact"], abs=1e-9)
    assert (result.n_scored, result.n_expected) == (truth["official"]["samples"], 23)
    assert bool(result.warnings) == (case == "missing")


@pytest.mark.parametrize("case", ["main", "perfect"])
def test_pope(scoring: Path, case: str) -> None:
    truth, result = expected(scoring, "pope", case), scored(scoring, "pope", case)
    assert [{key: item[key] for key in ("question_id", "parsed")} for item in result.items] == truth["per_item"]
    assert result.score == pytest.approx(truth["official"]["mean_f1_percent"], abs=1e-9)
    for category, numbers in truth["official"]["per_category"].items():
        ours = result.metrics["per_category"][category]
        assert ours == pytest.approx({key: value for key, value in numbers.items() if key != "error"}, abs=1e-9)


@pytest.mark.parametrize("case", ["main", "perfect"])
def test_mme(scoring: Path, case: str) -> None:
    truth, result = expected(scoring, "mme", case), scored(scoring, "mme", case)
    official = truth["official"]
    assert result.score == pytest.approx(official["Perception"]["total"], abs=1e-9)
    assert result.metrics["cognition"] == pytest.approx(official["Cognition"]["total"], abs=1e-9)
    categories = official["Perception"]["categories"] | official["Cognition"]["categories"]
    assert result.metrics["categories"] == pytest.approx(categories, abs=1e-9)


@pytest.mark.parametrize("case", ["forms", "perfect"])
def test_mmbench(scoring: Path, case: str) -> None:
    truth, result = expected(scoring, "mmbench", case), scored(scoring, "mmbench", case)
    assert {str(item["question_id"]): item["letter"] for item in result.items} == truth["vlmevalkit_letter"]
    assert result.metrics["circular_per_question"] == truth["vlmevalkit_circular_per_question"]
    assert result.score == pytest.approx(100 * truth["vlmevalkit_circular"], abs=1e-9)
    assert result.metrics["vanilla_all"] == pytest.approx(100 * truth["vlmevalkit_vanilla_all"], abs=1e-9)
    assert result.metrics["vanilla_base"] == pytest.approx(100 * truth["vlmevalkit_vanilla_base"], abs=1e-9)
    report = truth["vlmevalkit_report"]
    for name, value in result.metrics["per_category"].items():
        assert value == pytest.approx(100 * report[name], abs=1e-9)


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_saved_prompts_are_those_of_the_published_scripts(scoring: Path, benchmark: BenchmarkName) -> None:
    file = "predictions_perfect" if benchmark == "mmbench" else "answers_main"
    lines = {(line["question_id"], line["prompt"]): line for line in records(scoring / benchmark / f"{file}.jsonl")}
    asked = BENCHMARKS[benchmark].questions(scoring)
    assert {(question.question_id, question.prompt) for question in asked} == set(lines)
    for question in asked:
        assert "<image>" not in question.text, "the prompt template places the picture"
        assert question.text.removeprefix("<image>\n").startswith(question.prompt.removeprefix("<image>\n"))
        for key, value in question.extra.items():
            assert lines[(question.question_id, question.prompt)][key] == value


@pytest.mark.parametrize(("benchmark", "case"), CASES)
def test_score_command(scoring: Path, benchmark: BenchmarkName, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = scoring / benchmark / f"{'predictions' if benchmark == 'mmbench' else 'answers'}_{case}.jsonl"
    assert score(ScoreConfig(benchmark=benchmark, data=scoring / benchmark, answers=answers, json=True)) == 0
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    fields = ["benchmark", "protocol", "score", "metrics", "n_scored", "n_expected", "warnings", "items"]
    assert list(last) == fields
    assert last == scored(scoring, benchmark, case).model_dump(mode="json")
    assert f"{last['score']:.2f}" in out.splitlines()[0]
    assert len(err.splitlines()) == len(last["warnings"])
