"""alignkd-bench through its commands: measure, report, JSON, exit codes, help without the optional packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import SPEEDS, make_row

from runtime_bench.cli import main
from runtime_bench.result import read_results, write_results

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxruntime", "scipy", "plotly", "jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process -> its exit code."""
    monkeypatch.setattr(sys, "argv", ["alignkd-bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_run_writes_rows_and_report_joins_them(
    made_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "results.json", tmp_path / "report.html"
    quick = ("--warmup", "0", "--repeats", "2", "--load-repeats", "1", "--new-tokens", "3", "--threads", "1")
    assert bench(monkeypatch, "run", made_bundle, *quick, "--output", results, "--json") == 0
    out = capsys.readouterr().out
    assert "tiny" in out and "onnx fp32" in out
    (row,) = read_results(results)
    assert json.loads(out.splitlines()[-1]) == {"output": str(results), "rows": [row.model_dump(mode="json")]}
    assert bench(monkeypatch, "report", results, "--output", page, "--json") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        last["report"] == str(page)
        and last["table"][0]["variant"] == "onnx fp32"
        and last["table"][0]["vision ms"] != "–"
    )
    assert page.read_text().startswith("<!doctype html>")


def test_report_prints_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "r.json", [make_row(speeds=SPEEDS)])
    assert bench(monkeypatch, "report", tmp_path / "r.json", "--output", tmp_path / "r.html", "--markdown") == 0
    assert capsys.readouterr().out.startswith("| bundle | variant |")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["run"], "no bundle given"),
        (["report"], "no results file given"),
        (["report", "nix.json"], "nix.json does not exist"),
        (["report", "bad.json"], "bad.json is not JSON"),
        (["run", "nix"], "nix is no bundle"),
        (["run", "nix", "--output", "bad.json"], "bad.json exists already"),
        (["report", "good.json", "--output", "bad.json"], "bad.json exists already"),
        (["run", "nix", "--repeats", "0"], "--repeats is 0; it must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    write_results(tmp_path / "good.json", [make_row(speeds=SPEEDS)])
    before = sorted(tmp_path.iterdir())
    assert bench(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_changed_bundle_is_code_3_and_nothing_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (bundle / "tokenizer.model").open("ab") as file:
        file.write(b"x")
    assert bench(monkeypatch, "run", bundle, "--output", tmp_path / "r.json") == 3
    assert "tokenizer.model" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("command", ["", "run", "accuracy", "score", "report"])
def test_help_needs_no_optional_package(command: str) -> None:
    arguments = ["alignkd-bench", *command.split(), "--help"]
    code = f"{BLOCKED}\nsys.argv = {arguments!r}\nfrom runtime_bench.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: alignkd-bench" in done.stdout, done.stderr
