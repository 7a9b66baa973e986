"""alignkd-data check on every format: each fault of the list is named in its row, leaks and copies included."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import WRITERS, add_member, add_sample
from PIL import Image

from distill.data_doctor.doctor import ImageRule, check_data
from distill.data_doctor.findings import DataReport, Findings
from distill.data_doctor.row_check import LengthRule
from distill.demo_world.demo_benchmarks import WRITERS as BENCHMARKS
from tests.distill.runs import data_command

STUDENT = Path(__file__).parents[1] / "golden" / "reference" / "student"
ROOMY = LengthRule(max_length=2048, visual_tokens=144)
FORMATS = sorted(WRITERS)
NAMED = ("list", "lines", "messages", "parts")  # images are files of their own
Rows = list[dict[str, Any]]


def pixels(seed: int, size: int = 48) -> Image.Image:
    """A picture with large structures, unlike that of any other seed."""
    coarse = np.random.RandomState(seed).randint(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        pixels(number).save(tmp_path / f"{number}.png")
    return tmp_path


def sound() -> Rows:
    """Two text rows and three with images of their own."""
    rows: Rows = []
    for number in range(5):
        marker = "<image>\n" if number < 3 else ""
        talk = [{"from": "human", "value": f"{marker}What is {number}?"}, {"from": "gpt", "value": "a dog"}]
        rows.append({"id": str(number), "conversations": talk} | ({"image": f"{number}.png"} if number < 3 else {}))
    return rows


def check(data: Path, rule: LengthRule = ROOMY, **images: Any) -> DataReport:
    return check_data(data, None, rule, ImageRule(**images))


def said(message: int, text: str) -> Callable[[Rows, Path], object]:
    return lambda rows, folder: rows[1]["conversations"][message].update(value=text)


def corrupt(data: bytes) -> Callable[[Rows, Path], object]:
    return lambda rows, folder: (folder / "1.png").write_bytes(data)


def cut(rows: Rows, folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-60])


def bomb() -> bytes:
    """A PNG that claims more pixels than Pillow opens."""
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    raw = bytearray(data.getvalue())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


FAULTS: dict[str, tuple[Callable[[Rows, Path], object], str]] = {
    "empty answer": (said(1, " "), "empty-answer"),
    "no marker": (said(0, "What?"), "image-marker"),
    "two markers": (said(0, "<image> and <image>?"), "image-marker"),
    "marker in the answer": (said(1, "an <image>"), "image-marker"),
    "role": (lambda rows, folder: rows[1]["conversations"][1].update({"from": "bot"}), "roles"),
    "system": (lambda rows, folder: rows[1]["conversations"][0].update({"from": "system"}), "roles"),
    "unanswered": (lambda rows, folder: rows[1]["conversations"].pop(), "roles"),
    "no messages": (lambda rows, folder: rows[1].update(conversations=[]), "row-shape"),
    "same id": (lambda rows, folder: rows[1].update(id="0"), "duplicate-id"),
    "missing": (lambda rows, folder: (folder / "1.png").unlink(), "image-missing"),
    "cut": (cut, "image-corrupt"),
    "no bytes": (corrupt(b""), "image-corrupt"),
    "no picture": (corrupt(b"hello"), "image-corrupt"),
    "bomb": (corrupt(bomb()), "image-corrupt"),
    "too long": (said(1, "word " * 2000), "too-long"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_planted_fault_is_named_in_every_format(name: str, fault: str, folder: Path) -> None:
    rows = sound()
    plant, kind = FAULTS[fault]
    plant(rows, folder)
    report = check(WRITERS[name](folder, rows))
    assert {(found.row, found.kind) for found in report.faults} == {(1, kind)}, report.faults
    assert report.faults[0].id == rows[1]["id"] and report.faulty_rows == 1 and report.warnings == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_sound_set_has_no_findings_and_odd_pictures_are_warnings(name: str, folder: Path) -> None:
    report = check(WRITERS[name](folder, sound()))
    assert report.faults == report.warnings == []
    assert (report.rows, report.with_image, report.text_only, report.images) == (5, 3, 2, 3)


@pytest.mark.parametrize("name", FORMATS)
def test_turned_copied_and_similar_pictures_are_warnings(name: str, folder: Path) -> None:
    rows = [sound()[0] | {"id": str(number), "image": f"{number}.png"} for number in range(4)]
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels(0).save(folder / "1.png", exif=exif)  # other bytes, the same picture
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    report = check(WRITERS[name](folder, rows))
    assert report.faults == []
    kinds = {(found.row, found.kind) for found in report.warnings}
    assert kinds == {(1, "image-rotated"), (1, "image-near-duplicate"), (3, "image-duplicate")}
    texts = {found.kind: found.message for found in report.warnings}
    assert "EXIF orientation 6" in texts["image-rotated"] and "of row 0" in texts["image-near-duplicate"]
    assert "has the same bytes as" in texts["image-duplicate"] and "of row 2" in texts["image-duplicate"]


@pytest.mark.parametrize("name", FORMATS)
def test_labels_that_would_all_be_masked_and_images_that_are_cut_off_are_named(name: str, folder: Path) -> None:
    rows = sound()
    rows[1]["conversations"][0]["value"] = "<image>\n" + "what " * 300
    late = [{"from": "human", "value": "x " * 300}, {"from": "gpt", "value": "b"}, *rows[2]["conversations"]]
    rows[2]["conversations"] = late
    rows[3]["conversations"][1]["value"] = "dog " * 300  # too long, and what is left still teaches
    report = check(WRITERS[name](folder, rows), LengthRule(250, 144, STUDENT))
    found: dict[int, set[str]] = {}
    for fault in report.faults:
        found.setdefault(fault.row, set()).add(fault.kind)
    assert found == {1: {"too-long", "all-masked"}, 2: {"too-long", "all-masked", "image-cut"}, 3: {"too-long"}}
    assert report.exact_lengths


@pytest.mark.parametrize("benchmark", sorted(BENCHMARKS))
@pytest.mark.parametrize("name", ["list", "tar"])
def test_pictures_of_each_benchmark_are_found_in_the_data(
    name: str, benchmark: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("benchmarks")
    BENCHMARKS[benchmark](root / benchmark, random.Random(1), 6)
    from distill.data_doctor.benchmark_pictures import benchmark_pictures

    shown, source = list(benchmark_pictures(root))[-1]
    stolen = Image.open(source if isinstance(source, Path) else io.BytesIO(source)).convert("RGB")
    stolen.resize((200, 200)).save(folder / "1.png")
    report = check(WRITERS[name](folder, sound()), benchmarks=(root,))
    (fault,) = report.faults
    assert (fault.row, fault.kind) == (1, "benchmark-leak") and report.benchmark_pictures >= 1
    assert benchmark in fault.message and "of 128 bits" in fault.message
    assert (shown in fault.message) or benchmark == "mmbench"  # its rotations show the same picture


def test_several_images_of_a_row_are_one_fault(folder: Path) -> None:
    talk = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "x"}]
    (folder / "rows.json").write_text(json.dumps([{"id": "a", "messages": talk, "images": ["0.png", "1.png"]}]))
    (fault,) = check(folder / "rows.json").faults
    assert (fault.kind, fault.message) == ("several-images", "2 images; a conversation has one at most: split the row")


def test_samples_that_are_no_rows_are_named(folder: Path) -> None:
    path = folder / "s.tar"
    with tarfile.open(path, "w") as tar:
        add_sample(tar, "a", sound()[0], folder)
        add_member(tar, "b.png", (folder / "1.png").read_bytes())
        add_sample(tar, "c", sound()[2], folder)
        add_member(tar, "c.jpg", (folder / "3.png").read_bytes())
        add_member(tar, "d.json", b"{")
    report = check(path)
    found = {fault.row: (fault.kind, fault.message) for fault in report.faults}
    assert {row: kind for row, (kind, _) in found.items()} == {1: "row-shape", 2: "several-images", 3: "row-shape"}
    assert "has 0 .json members" in found[1][1] and "d.json of s.tar is not JSON" in found[3][1]


def test_a_fault_of_an_image_is_told_in_every_row_that_has_it(folder: Path) -> None:
    rows = [sound()[0] | {"id": str(number)} for number in range(3)]
    (folder / "0.png").write_bytes(b"")
    report = check(WRITERS["list"](folder, rows))
    assert [(fault.row, fault.kind) for fault in report.faults] == [(n, "image-corrupt") for n in range(3)]
    assert report.images == 1


def test_worker_processes_find_what_one_process_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sound() + sound()
    rows[6]["conversations"][1] = {"from": "gpt", "value": ""}
    data = WRITERS["tar"](folder, rows)
    monkeypatch.setattr("distill.data_doctor.doctor.ROWS_AT_ONCE", 3)
    monkeypatch.setattr("distill.data_doctor.doctor.PICTURES_AT_ONCE", 2)
    alone, together = check(data, workers=1), check(data, workers=2)
    assert alone.as_json() == together.as_json()
    assert alone.all_faults.by_kind() == {"duplicate-id": 5, "empty-answer": 1}


def test_findings_beyond_the_limit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data_doctor.findings.KEPT_FINDINGS", 2)
    found = Findings()
    for row in range(5):
        found.add(row, None, "image-missing", "gone")
    assert (len(found.listed), found.by_kind(), found.left_out) == (2, {"image-missing": 5}, 3)


def test_the_command_on_shards_with_benchmarks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = WRITERS["tar"](folder, sound())
    (folder / "bench" / "x").mkdir(parents=True)
    pixels(2).save(folder / "bench" / "x" / "q.jpg", quality=60)
    assert data_command(monkeypatch, "check", data, "--workers", 1, "--json") == 0
    words = ("--benchmarks", folder / "bench", "--workers", 2, "--json")
    assert data_command(monkeypatch, "check", data, *words) == 1
    lines = capsys.readouterr().out.splitlines()
    leak = next(line for line in lines if "benchmark-leak" in line)
    assert leak.startswith("fault: row 2 (id '2'): benchmark-leak: s-000000.tar:00002.png is in a benchmark: ")
    assert "bench/x/q.jpg (hashes differ in" in leak
    last = json.loads(lines[-1])
    assert (last["fault_counts"], last["benchmark_pictures"]) == ({"benchmark-leak": 1}, 1)
    assert [fault["row"] for fault in last["faults"]] == [2]


@pytest.mark.parametrize(
    "words,message",
    [
        (("--benchmarks", "none"), "--benchmarks none is no folder"),
        (("--benchmarks", "empty"), "--benchmarks empty holds no picture"),
        (("--hash-distance", "33"), "--hash-distance 33 must be from 0 to 32"),
        (("--workers", "-1"), "--workers at least 0"),
    ],
)
def test_usage_mistakes_are_code_2(
    words: tuple[str, ...],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    assert data_command(monkeypatch, "check", WRITERS["list"](folder, sound()), *words) == 2
    assert message in capsys.readouterr().err
