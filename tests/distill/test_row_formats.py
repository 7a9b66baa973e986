"""The same rows in every format are the same rows; the index finds them again, is reused, and holds none of them."""

from __future__ import annotations

import json
import pickle
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import WRITERS, add_member, as_messages, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bundle.errors import UsageError
from bundle.staging import sha256_of
from distill.data.image_source import PackedImage, open_source, read_image
from distill.data.row_sources import located_rows
from distill.data.rows import Row, open_rows, read_rows


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.{('png', 'jpg', 'webp')[number]}")
    return tmp_path


ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "images/0.png", "conversations": talk("<image>\nWhat is it?", "ein schöner Hund")},
    {"id": "b", "conversations": talk("漢字?", "yes", "Sure?", "no \U0001f600")},
    {"id": "c", "image": "images/1.jpg", "conversations": talk("Look: <image> now?", "a cat", "And?", "a mat")},
    {"id": "d", "image": "images/2.webp", "conversations": talk("What?\n<image>", "red")},
    {"id": "e", "conversations": talk("Why?", "so")},
]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, folder: Path) -> None:
    rows = read_rows(WRITERS[name](folder, ROWS), folder)
    expected = read_rows(WRITERS["list"](folder / "images", ROWS), folder)
    assert len(rows) == len(ROWS)
    assert rows.characters.tolist() == expected.characters.tolist() != [0] * 5
    assert rows.with_image.tolist() == [True, False, True, True, False]
    for one, other, raw in zip(rows, expected, ROWS, strict=True):
        assert (one.number, one.turns) == (other.number, other.turns)
        if one.image is None:
            assert other.image is None
        else:
            assert isinstance(one.image, PackedImage) == (name in ("parquet", "tar", "tar-messages"))
            assert read_image(one.image) == (folder / raw["image"]).read_bytes()
            assert open_source(one.image).size == (12, 9)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), st.booleans()), min_size=1),
    name=st.sampled_from(["list", "lines", "messages", "parts", "tar"]),
)
def test_the_index_finds_what_json_loads_finds(
    rows: list[tuple[str, bool]], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raws = [
        {"id": str(i), "note": text * 3, "conversations": talk(f"q{text}", f"a{text}")}
        for i, (text, _) in enumerate(rows)
    ]
    folder = tmp_path_factory.mktemp("rows")
    opened = read_rows(WRITERS[name](folder, raws))
    wanted = [as_messages(raw, name == "parts") if name in ("messages", "parts") else raw for raw in raws]
    order = list(range(len(raws)))
    random.Random(0).shuffle(order)
    assert [opened.raw(i) for i in order] == [wanted[i] for i in order]
    assert [opened[i].turns[0].answer for i in order] == [f"a{rows[i][0]}".strip() for i in order]


def test_an_index_is_used_again_until_the_data_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, kept = WRITERS["list"](folder, ROWS), folder / "index"
    first = read_rows(data, folder, kept)
    assert first.sha256 == sha256_of(data)
    built = (kept / "index.json").stat().st_ino
    assert list(read_rows(data, folder, kept)) == list(first) and (kept / "index.json").stat().st_ino == built
    WRITERS["list"](folder, ROWS[:3])
    assert len(read_rows(data, folder, kept)) == 3
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_of_two_that_build_one_index_at_a_time_both_get_a_whole_one(folder: Path) -> None:
    data, kept = WRITERS["list"](folder, ROWS), folder / "index"
    other: list[list[Row]] = []

    def meanwhile(rows: int) -> None:
        if rows == 3 and not other:
            other.append(list(read_rows(data, folder, kept)))

    assert list(open_rows(data, folder, kept, meanwhile)) == other[0]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_temporary_index_goes_with_the_rows_and_travels_to_other_processes(folder: Path) -> None:
    rows = read_rows(WRITERS["tar"](folder, ROWS))
    place = rows.index.folder
    copy = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 1000 and list(copy) == list(rows)
    del copy
    assert place.is_dir()
    del rows
    assert not place.exists()


def test_a_hash_stands_for_the_data_of_shards(folder: Path) -> None:
    pattern = WRITERS["tar"](folder, ROWS)
    first = read_rows(pattern).sha256
    assert read_rows(pattern.parent).sha256 == first == read_rows(pattern.parent / "s-*.tar").sha256
    for shard in pattern.parent.iterdir():
        shard.unlink()
    pattern.parent.rmdir()
    assert read_rows(write_tar(folder, [ROWS[0] | {"id": "z"}, *ROWS[1:]])).sha256 != first


def test_opening_holds_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"id": str(number), "conversations": talk("q" * 1000, "a" * 9500)}) + "\n")
    tracemalloc.start()
    rows = read_rows(path, None, tmp_path / "index")
    row = rows[1999]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (row.number, int(rows.characters[7])) == (1999, 10_500)
    assert path.stat().st_size > 20_000_000 and peak < 8_000_000, peak  # the buffer of records, not the rows


def refused(data: Path, *words: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_rows(data)
    assert [word for word in words if word not in str(raised.value)] == [] and "\n" not in str(raised.value)


def test_shards_that_are_missing_cut_compressed_or_mixed_are_one_line(folder: Path) -> None:
    pattern = WRITERS["tar"](folder, ROWS)
    refused(pattern.parent / "s-{000000..000003}.tar", "2 of 4 files", "s-000002.tar")
    refused(pattern.parent / "s-{000003..000001}.tar", "counts down")
    second = pattern.parent / "s-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:700])
    refused(pattern, "s-000001.tar is no whole tar file")
    second.write_bytes(whole[:-1])
    refused(pattern, "no whole tar file (it ends inside a block)")
    second.write_text('[{"conversations": []}]')
    refused(pattern, "is tar and", "is list")
    second.unlink()
    with tarfile.open(second, "w:gz") as tar:
        add_member(tar, "a.json", b"{}")
    refused(pattern, "is compressed (gzip)", "unpack it first")


def test_none_of_the_formats_names_the_three(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for text in ("hello", "", '[{"prompt": "x", "answer": "y"}]', '{"text": 1}\n{"text": 2}'):
        path.write_text(text)
        refused(path, "LLaVA rows", "Hugging Face rows", "tar shards (webdataset)")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no train.json and no .tar or .parquet shards")


def test_a_parquet_file_of_other_columns_or_cut_is_one_line(folder: Path) -> None:
    data = WRITERS["parquet"](folder, ROWS)
    whole = data.read_bytes()
    data.write_bytes(whole[:-20])
    refused(data, "no whole parquet file")
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"text": ["a"]}), data)
    refused(data, "has columns text; it needs 'messages'")


@pytest.mark.parametrize(
    "row,message",
    [
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "'messages' must be a list of user and assistant"),
        (
            {"messages": [{"role": "system", "content": "Hm"}, {"role": "user", "content": "?"}]},
            "message 0 is a system message; the model's template has its own",
        ),
        ({"messages": as_messages({"conversations": talk("a", "b")})["messages"], "images": ["x", "y"]}, "2 images"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, {}]}, "a part must be of type text or image"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}]},
            "no image and 1",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://x.invalid/a.png"}]}, {}]},
            "is an address; nothing is fetched",
        ),
    ],
)
def test_a_bad_row_of_messages_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = as_messages({"conversations": talk("a", "b")})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([good, row]))
    refused(path, f"{path} row 1", message)


def test_images_of_parts_and_of_rows_are_found_by_name(folder: Path) -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    asked = [{"type": "image", "path": "images/0.png"}, {"type": "text", "text": "What?"}]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": asked}, answer]},
        {"messages": [{"role": "user", "content": "<image>What?"}, answer], "image": "images/0.png"},
        {"messages": [{"role": "user", "content": "<image>What?"}, answer], "images": [{"path": "images/0.png"}]},
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    found = list(read_rows(path))
    assert [row.image for row in found] == [(folder / "images" / "0.png").resolve()] * 3
    assert len({row.turns for row in found}) == 1


def test_faulty_rows_pass_until_they_are_read(folder: Path) -> None:
    rows = open_rows(WRITERS["list"](folder, [ROWS[0], "text", ROWS[1]]), folder)
    assert rows[2].turns[0].answer == "yes" and rows.with_image.tolist() == [True, False, False]
    with pytest.raises(UsageError, match="row 1 is a JSON str"):
        rows[1]
    with pytest.raises(UsageError, match="row 1 is a JSON str"):
        rows.check(missing_images=False)


def test_an_image_that_comes_later_is_not_missing_any_more(folder: Path) -> None:
    data = WRITERS["list"](folder, ROWS)
    (folder / "images" / "0.png").rename(folder / "gone.png")
    rows = open_rows(data, folder, folder / "index")
    with pytest.raises(UsageError, match=r"row 0: image .*0\.png does not exist"):
        rows.check(missing_images=True)
    rows.check(missing_images=False)
    (folder / "gone.png").rename(folder / "images" / "0.png")
    open_rows(data, folder, folder / "index").check(missing_images=True)


def test_names_in_shards_stay_names(tmp_path: Path) -> None:
    """Links and climbing names of a tar are never followed or unpacked."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("../../a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        add_member(tar, "../../b.json", json.dumps({"conversations": talk("a", "b")}).encode())
    before = sorted(tmp_path.rglob("*"))
    assert [row.image for row in read_rows(path)] == [None]
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_are_located_one_at_a_time(folder: Path) -> None:
    data = WRITERS["parquet"](folder, ROWS * 40)
    with (folder / "packed").open("wb") as packed:
        some = located_rows([data], "parquet", packed)
        next(some)
        assert packed.tell() < 2000  # a row's JSON and picture, not all of them
