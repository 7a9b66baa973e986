"""Rows on disk: round trip, and every way a results file can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench_rows import SPEEDS, make_row

from bundle.errors import UsageError
from runtime_bench.result import now, read_results, write_results


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    rows = [make_row(speeds=SPEEDS), make_row(scores={"gqa": 50.0, "mme": 1500.0})]
    write_results(tmp_path / "results.json", rows)
    assert read_results(tmp_path / "results.json") == rows


def test_a_row_says_everything_about_itself(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", [make_row(speeds=SPEEDS)])
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert row["schema_version"] == 1
    assert re.fullmatch(r"[0-9a-f]{64}", row["bundle"]["manifest_sha256"])
    assert row["measurements"]["ttft_ms"]["samples"] == [50.0, 52.0, 51.0]
    for part in ("time", "commit", "runtime", "emulated", "device", "settings", "memory", "excludes"):
        assert part in row


def test_time_is_rfc_3339_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", now())


def test_a_missing_file_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nix\.json does not exist; make one with: alignkd-bench run"):
        read_results(tmp_path / "nix.json")


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "is not JSON"),
        ("[]", "is no results file"),
        ('{"rows": 3}', "field 'rows'"),
        ('{"schema_version": 2, "rows": []}', "schema_version 2; this alignkd reads up to 1"),
        ('{"rows": [{"kind": "run"}]}', r"field 'rows\.0\.time': Field required"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        read_results(path)


def test_an_unknown_field_is_not_swallowed(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", [make_row(speeds=SPEEDS)])
    raw: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    raw["rows"][0]["vision_ms"] = 3
    (tmp_path / "r.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="vision_ms"):
        read_results(tmp_path / "r.json")
