"""alignkd-data check: every planted fault is named by row, kind and reason; a sound data set passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bundle.errors import UsageError
from distill.data.rows import parse_row
from distill.data_doctor.doctor import check_data
from distill.data_doctor.findings import DataReport
from distill.data_doctor.row_check import LengthRule
from tests.distill.runs import data_command

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
ROOMY = LengthRule(max_length=2048, visual_tokens=144)


def row(
    name: str = "a", image: str | None = "a.png", question: str = "What is it?", answer: str = "a dog"
) -> dict[str, Any]:
    """One sound row."""
    marker = "" if image is None else "<image>\n"
    talk = [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": talk}


def changed(**parts: Any) -> dict[str, Any]:
    """A sound row with fields replaced; None removes the field."""
    return {key: value for key, value in {**row("x"), **parts}.items() if value is not None}


def talk(*messages: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in messages]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (6, 4), "blue").save(tmp_path / "b.jpg")
    return tmp_path


def write(folder: Path, rows: object) -> Path:
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def check(folder: Path, rows: object, rule: LengthRule = ROOMY) -> DataReport:
    return check_data(write(folder, rows), None, rule)


def test_a_sound_data_set_has_no_findings(folder: Path) -> None:
    turns = talk(("human", "<image>\nWhat?"), ("gpt", "a dog"), ("human", "Sure?"), ("gpt", "yes"))
    report = check(
        folder, [row("1"), row("2", "b.jpg"), row("3", None), changed(id="4", conversations=turns), changed(id=5)]
    )
    assert report.faults == report.warnings == []
    assert (report.rows, report.with_image, report.text_only, report.images) == (5, 4, 1, 2)


FAULTS: dict[str, tuple[Any, str, str]] = {
    "row is a string": ("text", "row-shape", "JSON str"),
    "no conversations": (changed(conversations=None), "row-shape", "'conversations' must be a list"),
    "empty conversations": (changed(conversations=[]), "row-shape", "got []"),
    "value is a number": (changed(conversations=talk(("human", "<image>"), ("gpt", 3))), "field-type", "got 3"),
    "value is missing": (changed(conversations=talk(("human", None), ("gpt", "x"))), "field-type", "message 0"),
    "message is a list": (changed(conversations=[["human", "hi"], ["gpt", "x"]]), "field-type", "message 0"),
    "image is a list": (changed(image=["a.png"]), "field-type", "'image' must be one file name"),
    "image is empty": (changed(image=""), "field-type", "'image'"),
    "id is a list": (changed(id=["x"]), "field-type", "'id' must be a string"),
    "roles swapped": (changed(conversations=talk(("gpt", "<image>"), ("human", "x"))), "roles", "must be from 'human'"),
    "unknown role": (changed(conversations=talk(("user", "<image>\nhi"), ("gpt", "x"))), "roles", '"user"'),
    "question unanswered": (changed(conversations=talk(("human", "<image>"))), "roles", "no answer"),
    "empty answer": (row(answer=" \n "), "empty-answer", "message 1"),
    "no marker": (changed(conversations=talk(("human", "hi"), ("gpt", "x"))), "image-marker", "0 '<image>'"),
    "two markers": (row(question="<image> again"), "image-marker", "2 '<image>' in the questions for 1 image"),
    "marker without image": (changed(image=None), "image-marker", "1 '<image>' in the questions for 0 image"),
    "marker in answer": (row(answer="see <image>"), "image-marker", "in the answers"),
    "missing image": (row(image="gone.png"), "image-missing", "gone.png does not exist"),
    "image is a folder": (row(image="sub"), "image-missing", "sub does not exist"),
    "not an image": (row(image="note.png"), "image-corrupt", "note.png is no picture"),
    "truncated image": (row(image="cut.png"), "image-corrupt", "cut.png is damaged"),
    "climbs out": (row(image="../a.png"), "image-outside", "leaves its folder"),
    "absolute": (row(image="/etc/hostname"), "image-outside", "leaves its folder"),
    "link out": (row(image="link.png"), "image-outside", "leaves its folder"),
    "too long": (row(answer="word " * 2000), "too-long", "at least 2147 positions, 144 of them for its image"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "sub").mkdir()
    (folder / "note.png").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "b.jpg").read_bytes()[:-40])
    outside = tmp_path_factory.mktemp("outside") / "b.png"
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "link.png").symlink_to(outside)
    bad, kind, words = FAULTS[name]
    report = check(folder, [row("sound"), bad, row("also sound")])
    assert {fault.row for fault in report.faults} == {1}
    assert {fault.kind for fault in report.faults} == {kind}, report.faults
    assert words in report.faults[0].message


def test_every_fault_of_a_row_is_named_not_only_the_first(folder: Path) -> None:
    bad = {"id": "x", "image": "gone.png", "conversations": talk(("gpt", "<image><image>"), ("human", ""))}
    report = check(folder, [bad])
    assert sorted(report.all_faults.by_kind()) == ["empty-answer", "image-marker", "image-missing", "roles"]
    assert report.faulty_rows == 1


def test_the_second_use_of_an_id_is_the_fault(folder: Path) -> None:
    report = check(folder, [row("1"), row("2"), row("1")])
    assert [(fault.row, fault.id, fault.kind, fault.message) for fault in report.faults] == [
        (2, "1", "duplicate-id", "row 0 has the same id")
    ]


def test_a_rotated_photo_is_a_warning(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(folder / "turned.jpg", exif=exif)
    report = check(folder, [row("1"), row("2", "turned.jpg")])
    assert report.faults == []
    assert [(found.row, found.kind) for found in report.warnings] == [(1, "image-rotated")]
    assert "EXIF orientation 6" in report.warnings[0].message


def test_clean_rows_train_and_misshapen_ones_do_not(folder: Path) -> None:
    for name, (bad, kind, _) in FAULTS.items():
        if kind in ("row-shape", "roles", "image-marker", "empty-answer", "image-outside"):
            if name == "link out":
                continue  # needs the link of the other test
            with pytest.raises(UsageError):
                parse_row(bad, 0, folder / "train.json", folder)
    assert parse_row(row(), 0, folder / "train.json", folder).turns[0].answer == "a dog"


def test_lengths_with_a_checkpoint_are_those_of_training(folder: Path) -> None:
    pytest.importorskip("torch", reason="needs torch: the training code encodes the row")
    from bundle.tokenizer import open_tokenizer
    from distill.batches.encoding import encode_row
    from distill.models.processing import read_processing

    processing = read_processing(REFERENCE / "student")
    tokenizer = open_tokenizer(processing.tokenizer, REFERENCE / "student")
    parsed = parse_row(row(), 0, folder / "train.json", folder)
    expected = len(encode_row(parsed, processing, tokenizer)[0]) - 1 + 144
    exact = check(folder, [row()], LengthRule(expected, 144, REFERENCE / "student"))
    assert (exact.longest, exact.exact_lengths, exact.faults) == (expected, True, [])
    (fault,) = check(folder, [row()], LengthRule(expected - 1, 144, REFERENCE / "student")).faults
    assert fault.message == f"takes {expected} positions, 144 of them for its image; the model has {expected - 1}"
    assert check(folder, [row()]).longest < expected  # words are never more than tokens


def test_the_command_names_rows_and_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, [row("1"), row("2", "gone.png"), row("3", answer="")])
    assert data_command(monkeypatch, "check", folder, "--json") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fault: row 1 (id '2'): image-missing: ")
    assert lines[1] == "fault: row 2 (id '3'): empty-answer: message 1: the answer is empty"
    last = json.loads(lines[-1])
    assert (last["rows"], last["faulty_rows"]) == (3, 2)
    assert last["fault_counts"] == {"image-missing": 1, "empty-answer": 1}
    assert [(fault["row"], fault["id"], fault["kind"]) for fault in last["faults"]] == [
        (1, "2", "image-missing"),
        (2, "3", "empty-answer"),
    ]


def test_a_sound_set_is_code_0_by_file_and_by_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder, [row()])
    assert data_command(monkeypatch, "check", folder) == data_command(monkeypatch, "check", data) == 0
    assert capsys.readouterr().out.count("no faults") == 2


def test_a_long_list_is_cut_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, [row(str(i), answer="") for i in range(6)])
    assert data_command(monkeypatch, "check", folder, "--show", "2") == 1
    out = capsys.readouterr().out
    assert out.count("fault: row") == 2 and "... and 4 more" in out and "6 of 6 rows are faulty" in out
    assert data_command(monkeypatch, "check", folder, "--show", "0") == 1
    assert capsys.readouterr().out.count("fault: row") == 6


@pytest.mark.parametrize(
    "content,message",
    [("{", "is not JSON"), ("{}", "row 0 is {}"), ("[]", "holds no row"), (b"\xff", "is not JSON")],
)
def test_a_file_of_the_wrong_shape_is_one_line_and_code_2(
    content: str | bytes,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "d.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert data_command(monkeypatch, "check", tmp_path / "d.json") == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["check", "nix.json"], "nix.json does not exist"),
        (["check", "."], "holds no train.json"),
        (["check", "d.json", "--images", "nix"], "image folder nix does not exist"),
        (["check", "d.json", "--checkpoint", "nix"], "nix"),
        (["check", "d.json", "--max-length", "0"], "--max-length"),
    ],
)
def test_usage_mistakes_are_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.json").write_text(json.dumps([row(image=None)]))
    assert data_command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
