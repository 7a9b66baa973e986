"""The real set: hand-written pairs on pictures of scikit-image's wheel, as training data and as a GQA folder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from bundle.errors import UsageError
from distill.data_cli import main
from distill.data_doctor.doctor import LengthRule, check_data
from distill.real_set import real_set
from distill.real_set.real_set import make_real, read_real_set
from runtime_bench.accuracy import gqa
from runtime_bench.accuracy.answers import read_answers
from runtime_bench.accuracy.questions import SHORT_ANSWER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "set"
    make_real(output)
    return output


def test_the_committed_pairs_are_whole() -> None:
    real = read_real_set()
    assert 20 <= len(real.pairs) <= 30
    assert {pair.picture for pair in real.pairs} == set(real.pictures)
    assert real.instruction == SHORT_ANSWER
    assert {picture.split for picture in real.pictures.values()} == {"train", "test"}
    assert all(picture.origin and picture.licence for picture in real.pictures.values())
    assert len({(pair.picture, pair.question) for pair in real.pairs}) == len(real.pairs)
    for pair in real.pairs:  # GQA lowers the prediction and compares it whole
        assert pair.answer == pair.answer.lower().strip().rstrip(".") != "" and pair.question.endswith("?")


def test_both_splits_pass_the_data_check(folder: Path) -> None:
    rule = LengthRule(max_length=512, visual_tokens=144)
    train, test = (check_data(folder / f"{split}.json", None, rule) for split in ("train", "test"))
    assert train.faults == test.faults == train.warnings == test.warnings == []
    assert train.rows + test.rows == len(read_real_set().pairs)


def test_no_picture_is_in_both_splits(folder: Path) -> None:
    used = [{row["image"] for row in json.loads((folder / f"{split}.json").read_text())} for split in ("train", "test")]
    assert used[0] and used[1] and not used[0] & used[1]


def test_pictures_are_whole_and_their_licences_travel_with_them(folder: Path) -> None:
    notes = (folder / "LICENCES.md").read_text()
    pictures = sorted((folder / "images").iterdir())
    assert len(pictures) == len(read_real_set().pictures)
    for picture in pictures:
        assert f"- {picture.name}: " in notes
        with Image.open(picture) as opened:
            opened.load()


def test_the_gqa_folder_scores_answers(folder: Path, tmp_path: Path) -> None:
    data = folder / "benchmarks" / "gqa"
    questions = gqa.questions(data)
    truth = {q["question_id"]: q for q in real_set.gqa_questions(read_real_set())}
    assert [q.question_id for q in questions] == list(truth)
    assert all(isinstance(q.image, Path) and q.image.is_file() for q in questions)
    right = {name: note["answer"] for name, note in real_set.gqa_annotations(read_real_set()).items()}
    wrong = questions[0].question_id
    lines = [
        {
            "question_id": q.question_id,
            "prompt": q.prompt,
            "text": "nothing" if q.question_id == wrong else right[str(q.question_id)].capitalize() + ".",
        }
        for q in questions
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = gqa.score(data, read_answers(tmp_path / "answers.jsonl"))
    assert score.n_scored == score.n_expected == len(questions)
    assert score.score == pytest.approx(100 * (len(questions) - 1) / len(questions))
    assert score.warnings == ()


def test_the_same_files_are_written_every_time(folder: Path, tmp_path: Path) -> None:
    make_real(tmp_path / "again")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_an_existing_output_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        make_real(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_another_picture_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheel").mkdir()
    for name in read_real_set().pictures:
        Image.new("RGB", (4, 4)).save(tmp_path / "wheel" / name)
    monkeypatch.setattr(real_set, "wheel_pictures", lambda: tmp_path / "wheel")
    with pytest.raises(UsageError, match=r"astronaut\.png is not the picture .*pip install 'scikit-image"):
        make_real(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wheel"]


def test_missing_scikit_image_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"scikit-image.*pip install 'alignkd\[data\]'"):
        make_real(tmp_path / "out")


def test_the_command_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["alignkd-data", "make-real", str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"output": str(tmp_path / "out"), "train": 17, "test": 13, "pictures": 17}
