"""Streaming a JSON list: the elements and bytes of json.loads whatever the window, one line for what is no JSON."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundle.errors import UsageError
from distill.data import json_elements
from distill.data.json_elements import line_elements, list_elements

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(['"', "\\", "]", "[,", "é漢😀", "\u2028", "}{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(
    value=st.lists(VALUES, max_size=6),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    chunk=st.integers(1, 40),
    bom=st.booleans(),
)
def test_a_list_is_read_as_json_loads_reads_it(
    value: list[Any], ascii_only: bool, indent: int | None, chunk: int, bom: bool, tmp_path_factory: Any
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    path = tmp_path_factory.mktemp("json") / "rows.json"
    data = (json_elements.BOM if bom else b"") + b" \n" + text.encode() + b"\n"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_elements, "CHUNK_BYTES", chunk)
        found = list(list_elements(path))
    assert [one.value for one in found] == value
    assert [json.loads(data[one.start : one.start + one.size]) for one in found] == value


@FEW
@given(value=st.lists(VALUES, max_size=6), ascii_only=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_lines_are_read_as_json_loads_reads_them(
    value: list[Any], ascii_only: bool, end: str, tmp_path_factory: Any
) -> None:
    data = end.join(json.dumps(one, ensure_ascii=ascii_only) for one in value).encode()
    path = tmp_path_factory.mktemp("json") / "rows.jsonl"
    path.write_bytes(data)
    found = list(line_elements(path))
    assert [one.value for one in found] == value
    assert [json.loads(data[one.start : one.start + one.size]) for one in found] == value


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "must begin with '['"),
        ('{"a": 1}', "must begin with '['"),
        ("[1, 2", "the list is not closed: byte 5"),
        ("[1 2]", "expected ',' or ']': byte 3"),
        ("[1, 2] 3", "more follows the list: byte 7"),
        ("[1, ]", "Expecting value: byte 4"),
        ('["abc]', "Unterminated string"),
        ('[{"a": tru}]', "Expecting value: byte 7"),
        ("[1,\n" + "[" * 100_000, "nested too deeply"),
        (b'["\xff"]', "can't decode byte 0xff"),
        ("[" + "9" * 5000 + "]", "Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_what_is_no_list_is_one_line(
    text: str | bytes, message: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk == 3 and len(text) > 1000:
        pytest.skip("slow to feed by threes, and no other path")
    monkeypatch.setattr(json_elements, "CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match="is not JSON") as raised:
        list(list_elements(path))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UsageError, match=r"rows.jsonl line 3 is not JSON"):
        list(line_elements(path))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[0")
        for _ in range(200):
            file.write("," + json.dumps("x" * 100_000))
        file.write("]")
    tracemalloc.start()
    count = sum(1 for _ in list_elements(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 201 and path.stat().st_size > 20_000_000
    assert peak < 8_000_000, f"{peak} bytes for a window of {json_elements.CHUNK_BYTES}"
