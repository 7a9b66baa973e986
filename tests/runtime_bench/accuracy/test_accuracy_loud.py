"""What is missing, double, shuffled, broken or of other data never passes in silence, and never divides by zero."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UsageError
from runtime_bench.accuracy.answers import read_answers
from runtime_bench.accuracy.registry import BENCHMARKS
from runtime_bench.accuracy.score import BenchmarkName, Score

Records = list[dict[str, Any]]
Rewrite = Callable[[Path, Callable[[Records], Records]], Path]
ROOT = Path(__file__).parents[3]
ALL = list(BENCHMARKS)


def answer_file(folder: Path, benchmark: str) -> Path:
    return folder / benchmark / ("predictions_forms.jsonl" if benchmark == "mmbench" else "answers_main.jsonl")


def scored(data: Path, benchmark: BenchmarkName, answers: Path) -> Score:
    return BENCHMARKS[benchmark].score(data, read_answers(answers))


def shuffled(records: Records) -> Records:
    return random.Random(3).sample(records, len(records))


def said(text: str) -> Callable[[Records], Records]:
    return lambda records: [record | {"text": text} for record in records]


@pytest.mark.parametrize("benchmark", ALL)
def test_misordered_answers_score_the_same_and_say_so(
    scoring: Path, rewrite: Rewrite, benchmark: BenchmarkName
) -> None:
    straight = scored(scoring, benchmark, answer_file(scoring, benchmark))
    mixed = scored(scoring, benchmark, rewrite(answer_file(scoring, benchmark), shuffled))
    assert mixed.score == straight.score and mixed.items == straight.items
    assert straight.warnings == () and any("order" in warning for warning in mixed.warnings)


@pytest.mark.parametrize("benchmark", ALL)
def test_missing_answers_are_counted(scoring: Path, rewrite: Rewrite, benchmark: BenchmarkName) -> None:
    full = scored(scoring, benchmark, answer_file(scoring, benchmark))
    part = scored(scoring, benchmark, rewrite(answer_file(scoring, benchmark), lambda records: records[1:-2]))
    assert part.n_expected == full.n_expected and part.n_scored < full.n_scored == full.n_expected
    assert any("have no answer" in warning for warning in part.warnings)


@pytest.mark.parametrize("benchmark", ["gqa", "sqa", "mmbench"])
def test_last_duplicate_counts(scoring: Path, rewrite: Rewrite, benchmark: BenchmarkName) -> None:
    file = answer_file(scoring, benchmark)
    doubled = scored(scoring, benchmark, rewrite(file, lambda records: said("nonsense")(records[:3]) + records))
    assert doubled.items == scored(scoring, benchmark, file).items
    assert any("answered twice" in warning for warning in doubled.warnings)


@pytest.mark.parametrize("benchmark", ["textvqa", "pope", "mme"])
def test_duplicates_are_refused(scoring: Path, rewrite: Rewrite, benchmark: BenchmarkName) -> None:
    file = rewrite(answer_file(scoring, benchmark), lambda records: [*records, records[4]])
    last_line = len(file.read_text(encoding="utf-8").splitlines())
    with pytest.raises(UsageError, match=f"{file.name}:{last_line}: a second answer"):
        scored(scoring, benchmark, file)


@pytest.mark.parametrize("benchmark", ALL)
def test_answers_of_other_data(scoring: Path, rewrite: Rewrite, benchmark: BenchmarkName) -> None:
    def foreign(records: Records) -> Records:
        return [record | {"question_id": f"other{i}"} for i, record in enumerate(records)]

    file = answer_file(scoring, benchmark)
    with pytest.raises(UsageError, match="none of .* answers belongs"):
        scored(scoring, benchmark, rewrite(file, foreign))
    some = scored(scoring, benchmark, rewrite(file, lambda records: records + foreign(records[:2])))
    assert some.score == scored(scoring, benchmark, file).score
    assert any("2 answers match no question" in warning for warning in some.warnings)


@pytest.mark.parametrize("benchmark", ALL)
@pytest.mark.parametrize("text", ["", "No", "Yes", "Z"])
def test_one_answer_to_everything(scoring: Path, rewrite: Rewrite, benchmark: BenchmarkName, text: str) -> None:
    result = scored(scoring, benchmark, rewrite(answer_file(scoring, benchmark), said(text)))
    assert result.n_scored == result.n_expected and 0 <= result.score <= 2000
    json.dumps(result.model_dump(mode="json"), allow_nan=False)


def test_pope_that_never_says_yes_has_f1_zero(scoring: Path, rewrite: Rewrite) -> None:
    result = scored(scoring, "pope", rewrite(answer_file(scoring, "pope"), said("No")))
    assert result.score == 0 and len([warning for warning in result.warnings if "F1 is 0" in warning]) == 3


def test_pope_refuses_labels_of_another_version(data: Path) -> None:
    labels = data / "pope/coco/coco_pope_random.json"
    labels.write_text("".join(labels.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UsageError, match="no label for question_id"):
        scored(data, "pope", answer_file(data, "pope"))


def test_pope_labels_in_another_order_and_without_the_typing_error(data: Path) -> None:
    before = scored(data, "pope", answer_file(data, "pope"))
    for labels in (data / "pope/coco").iterdir():
        lines = labels.read_text(encoding="utf-8").replace("imange", "image").splitlines(keepends=True)
        labels.write_text("".join(reversed(lines)), encoding="utf-8")
    assert scored(data, "pope", answer_file(data, "pope")).score == before.score


def test_pope_over_fewer_categories(data: Path) -> None:
    (data / "pope/coco/coco_pope_random.json").unlink()
    result = scored(data, "pope", answer_file(data, "pope"))
    assert result.score == pytest.approx(100 * (0.625 + 4 / 7) / 2, abs=1e-9) and result.n_expected == 24
    assert any("no answers to: random" in warning for warning in result.warnings)


def test_mme_over_three_categories(data: Path) -> None:
    root = data / "mme/MME_Benchmark_release_version"
    for folder in root.iterdir():
        if folder.name not in ("existence", "color", "posters"):
            shutil.rmtree(folder)
    result = scored(data, "mme", answer_file(data, "mme"))
    assert result.score == pytest.approx(100 / 3 + 250 / 3 + 50 / 3, abs=1e-9)
    assert result.metrics["cognition"] is None and result.n_scored == result.n_expected == 18
    assert any("3 of 10 categories (at most 600" in warning for warning in result.warnings)


def test_mme_tabs_and_newlines_are_read_as_blanks(scoring: Path, rewrite: Rewrite) -> None:
    clean = scored(scoring, "mme", scoring / "mme/answers_perfect.jsonl")
    broken = rewrite(
        scoring / "mme/answers_perfect.jsonl",
        lambda records: [record | {"text": f"{record['text']}\tof\ncourse\r"} for record in records],
    )
    result = scored(scoring, "mme", broken)
    assert result.score == clean.score == 2000
    assert any("84 answers hold tabs or newlines" in warning for warning in result.warnings)


def test_mme_half_answered_image_is_not_right(scoring: Path, rewrite: Rewrite) -> None:
    result = scored(scoring, "mme", rewrite(scoring / "mme/answers_perfect.jsonl", lambda records: records[1:]))
    assert result.metrics["details"]["existence"] == pytest.approx(
        {"score": 100 + 200 / 3, "acc": 1.0, "acc_plus": 2 / 3, "questions": 5, "images": 3}
    )
    assert any("one of their two questions only" in warning for warning in result.warnings)


def test_sqa_takes_pictured_from_problems(scoring: Path, rewrite: Rewrite) -> None:
    file = scoring / "sqa/answers_perfect.jsonl"

    def disagree(records: Records) -> Records:
        wrong = {"text": "nothing", "prompt": "asked without a picture"}
        return [record | (wrong if record["question_id"] == "4" else {}) for record in records]

    result = scored(scoring, "sqa", rewrite(file, disagree))
    assert result.score == 100 * 15 / 16 and result.metrics["img_accuracy_official"] == 100
    assert any("1 prompts disagree" in warning for warning in result.warnings)


def test_sqa_names_the_other_question_file(scoring: Path, rewrite: Rewrite) -> None:
    def converted(records: Records) -> Records:
        return [record | {"prompt": "Context: N/A\nQuestion: Why?\nOptions: (A) x (B) y\n"} for record in records]

    result = scored(scoring, "sqa", rewrite(answer_file(scoring, "sqa"), converted))
    assert any("convert_sqa_to_llava.py" in warning for warning in result.warnings)


def test_textvqa_without_ocr_hints(scoring: Path, rewrite: Rewrite) -> None:
    def plain(records: Records) -> Records:
        return [
            record | {"prompt": "\n".join(line for line in record["prompt"].split("\n") if "OCR" not in line)}
            for record in records
        ]

    result = scored(scoring, "textvqa", rewrite(answer_file(scoring, "textvqa"), plain))
    assert result.score == scored(scoring, "textvqa", answer_file(scoring, "textvqa")).score
    assert result.metrics["ocr_hints_percent"] == 0 and any("not comparable" in w for w in result.warnings)


def test_gqa_without_groups_has_no_distribution(data: Path) -> None:
    path = data / "gqa/testdev_balanced_questions.json"
    questions = json.loads(path.read_text(encoding="utf-8"))
    for question in questions.values():
        question["groups"]["global"] = None
    path.write_text(json.dumps(questions), encoding="utf-8")
    assert scored(data, "gqa", answer_file(data, "gqa")).metrics["distribution"] is None


def test_mmbench_options_that_pandas_calls_missing(data: Path, rewrite: Rewrite) -> None:
    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit\n"
    rows = [
        '5\tWhich?\t"two\nlines"\tNone\tred\tblue\tgreen\tB\tocr\tAAAA\ts\tl2\t\tdev\n',
        "1000005\tWhich?\tnan\tred\tblue\tn/a\tgreen\tA\tocr\t5\ts\tl2\t\tdev\n",
    ]
    (data / "mmbench/mmbench_dev_en_20231003.tsv").write_text(header + "".join(rows), encoding="utf-8")
    (data / "mmbench/mmbench_dev_en_base_only.tsv").unlink()
    first, second = BENCHMARKS["mmbench"].questions(data)
    assert (first.prompt, first.extra["options"]) == ("two\nlines\nWhich?", [])
    assert second.prompt == "Which?\nA. red\nB. blue" and second.image == first.image == b"\x00\x00\x00"
    file = rewrite(
        answer_file(data, "mmbench"),
        lambda _: [{"question_id": 5, "text": "red"}, {"question_id": 1000005, "text": "A"}],
    )
    result = scored(data, "mmbench", file)
    assert (result.score, result.metrics["vanilla_all"]) == (100, 100)
    assert any("2 rows have an option that reads as a missing value" in warning for warning in result.warnings)


def test_mmbench_picks_the_table_that_was_answered(scoring: Path, rewrite: Rewrite) -> None:
    file = rewrite(
        scoring / "mmbench/predictions_perfect.jsonl",
        lambda records: [record for record in records if record["question_id"] < 1_000_000],
    )
    result = scored(scoring, "mmbench", file)
    assert (result.score, result.n_expected) == (100, 10)
    assert result.metrics["table"] == "mmbench_dev_en_base_only.tsv"
    assert any("no rotated rows" in warning for warning in result.warnings)


def test_mmbench_missing_rotation_is_not_right(scoring: Path, rewrite: Rewrite) -> None:
    file = rewrite(scoring / "mmbench/predictions_perfect.jsonl", lambda records: records[1:])
    result = scored(scoring, "mmbench", file)
    assert result.score == 90 and any("lack the answer to a rotation" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", ":2 is not JSON"), ('{"question_id": "g02"}', ":2: field 'text'"), ("[1]", ":2: field '"),
     ('{"question_id": "g02", "text": 5}', ":2: field 'text'"), ('{"question_id": null, "text": ""}', ":2: field")],
)  # fmt: skip
def test_broken_answer_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question_id": "g01", "text": "no"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="broken.jsonl") as caught:
        read_answers(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_answers_split_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "text": "a\u2028b\u0085c"}\n\n{"question_id": 2, "text": ""}', encoding="utf-8")
    assert [(answer.text, answer.where) for answer in read_answers(path)] == [
        ("a\u2028b\u0085c", "answers.jsonl:1"),
        ("", "answers.jsonl:3"),
    ]


@pytest.mark.parametrize(
    ("benchmark", "remove", "message"),
    [("gqa", "testdev_balanced_questions.json", "has no testdev_balanced"), ("sqa", "problems.json", "has no problems"),
     ("textvqa", "TextVQA_0.5.1_val.json", "has no TextVQA"), ("pope", "llava_pope_test.jsonl", "has no llava_pope"),
     ("mme", "MME_Benchmark_release_version", "or images"), ("mmbench", "*.tsv", "no MMBench TSV")],
)  # fmt: skip
def test_data_without_its_files(data: Path, benchmark: BenchmarkName, remove: str, message: str) -> None:
    for path in (data / benchmark).glob(remove):
        path.rename(data / path.name)
    with pytest.raises(UsageError, match=message):
        scored(data, benchmark, answer_file(data, benchmark))


def test_data_of_the_wrong_shape(data: Path) -> None:
    annotations = data / "textvqa/TextVQA_0.5.1_val.json"
    content = json.loads(annotations.read_text(encoding="utf-8"))
    content["data"][2]["answers"].pop()
    annotations.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match=r"field 'data\.2\.answers'.*at least 10"):
        scored(data, "textvqa", answer_file(data, "textvqa"))
    truth = data / "mme/MME_Benchmark_release_version/OCR/OCR_0001.txt"
    truth.write_text("Is it? Please answer yes or no.\tPerhaps\n", encoding="utf-8")
    with pytest.raises(UsageError, match="OCR_0001.txt:1 is not"):
        scored(data, "mme", answer_file(data, "mme"))


def test_pictures_cannot_leave_their_folder(data: Path) -> None:
    path = data / "gqa/llava_gqa_testdev_balanced.jsonl"
    path.write_text(json.dumps({"question_id": "1", "image": "../../secret.png", "text": "?"}) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="leaves its folder"):
        BENCHMARKS["gqa"].questions(data)


def test_scores_without_torch(scoring: Path) -> None:
    """All six through the real command, in a process where torch and the engines cannot be imported."""
    lines = "\n".join(
        f"accuracy.command.score(accuracy.command.ScoreConfig('{name}', Path({str(scoring)!r}), "
        f"Path({str(answer_file(scoring, name))!r}), json=True))"
        for name in ALL
    )
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'onnxruntime', 'executorch', 'coremltools', 'pandas', "
        "'plotly', 'scipy'): sys.modules[name] = None\nfrom pathlib import Path\n"
        f"import runtime_bench.accuracy.command\nfrom runtime_bench import accuracy\n{lines}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["benchmark"], round(line["score"], 2)) for line in printed] == [
        ("gqa", 44.44), ("sqa", 12.5), ("textvqa", 86.52), ("pope", 60.71), ("mme", 400.0), ("mmbench", 60.0),
    ]  # fmt: skip
