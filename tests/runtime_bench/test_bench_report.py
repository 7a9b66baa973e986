"""Joined rows, the table and the page: every row is there, nothing is invented, nothing is loaded from elsewhere."""

from __future__ import annotations

import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_rows import SPEEDS, make_row
from rich.console import Console

from bundle.errors import UsageError
from runtime_bench.joined import join_rows, shared_benchmarks
from runtime_bench.plots import pareto_figure, pareto_front, ttft_figure
from runtime_bench.report import commands, render_report, write_report
from runtime_bench.report_table import DASH, number, result_table, to_markdown, to_text
from runtime_bench.result import Row

SIX = {"gqa": 60.0, "sqa": 70.0, "textvqa": 50.0, "pope": 85.0, "mme": 1400.0, "mmbench": 65.0}


def rows_of_three_targets() -> list[Row]:
    """Teacher and student on ONNX, student on ExecuTorch (not scored) and on an interpreted Core ML."""
    slow = {name: [value * 3 for value in values] for name, values in SPEEDS.items()}
    return [
        make_row("teacher", precision="fp32", speeds=slow),
        make_row("student", speeds=SPEEDS),
        make_row("student", target="executorch", speeds=SPEEDS),
        make_row("student", target="coreml", speeds=slow, emulated=True),
        make_row("teacher", precision="fp32", scores={**SIX, "gqa": 63.0}),
        make_row("student", scores=SIX),
        make_row("student", target="coreml", scores=SIX),
        make_row("only-scored", precision="fp16", scores=SIX),
    ]


class Page(HTMLParser):
    """What a browser would fetch, and the text of the results table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self._inside: str | None = None
        self._table: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [value for name, value in given.items() if name in ("src", "href", "data", "action") and value]
        if tag == "table":
            self._table = given.get("id")
        if tag == "td" and self._table == "results":
            self.cells.append("")
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "td" and self._table == "results":
            self.cells[-1] += data
        if self._inside == "script":
            self.scripts[-1] += data


def test_run_and_accuracy_of_one_bundle_become_one_line() -> None:
    lines = join_rows(rows_of_three_targets())
    assert [(line.label, line.variant) for line in lines] == [
        ("teacher", "onnx fp32"),
        ("student", "onnx int4"),
        ("student", "executorch int4"),
        ("student", "coreml int4"),
        ("only-scored", "onnx fp16"),
    ]
    assert [line.run is not None for line in lines] == [True, True, True, True, False]
    assert [len(line.scores) for line in lines] == [6, 6, 0, 6, 6]


def test_the_same_bundle_with_other_threads_is_another_line() -> None:
    lines = join_rows([make_row(speeds=SPEEDS, threads=1), make_row(speeds=SPEEDS, threads=4), make_row(scores=SIX)])
    assert [line.label for line in lines] == ["student (1 threads, a processor)", "student (4 threads, a processor)"]
    assert all(line.scores for line in lines)


def test_two_different_results_for_one_benchmark_are_refused() -> None:
    with pytest.raises(UsageError, match="two results for gqa: 60 on 20 items and 61 on 20"):
        join_rows([make_row(scores=SIX), make_row(scores={**SIX, "gqa": 61.0})])
    assert len(join_rows([make_row(scores=SIX), make_row(scores=SIX)])) == 1


def test_scores_of_several_files_are_merged() -> None:
    (line,) = join_rows([make_row(scores={"mme": 1400.0}), make_row(scores={"gqa": 60.0})])
    assert list(line.scores) == ["gqa", "mme"]


def test_the_mean_counts_mme_as_percent_and_only_shared_benchmarks() -> None:
    lines = join_rows([make_row("a", scores=SIX), make_row("b", scores={"gqa": 40.0, "mme": 1000.0})])
    assert shared_benchmarks(lines) == ["gqa", "mme"]
    assert [line.mean_score(["gqa", "mme"]) for line in lines] == [65.0, 45.0]
    assert lines[1].mean_score(["gqa", "pope"]) is None
    table = result_table(lines)
    assert [row[-1] for row in table.cells] == ["65.0", "45.0"]
    assert any("gqa, mme" in note for note in table.notes)


def test_what_was_not_measured_is_a_dash_never_a_zero() -> None:
    table = result_table(join_rows(rows_of_three_targets()))
    cells = {row[:2]: dict(zip(table.head, row, strict=True)) for row in table.cells}
    scored, unscored = cells["only-scored", "onnx fp16"], cells["student", "executorch int4"]
    assert {scored[name] for name in ("vision ms", "TTFT ms", "decode tok/s", "peak MB")} == {DASH}
    assert {unscored[name] for name in ("GQA", "MME", "mean")} == {DASH}
    assert unscored["vision ms"] == "30.0" and scored["GQA"] == "60.0"
    zero = result_table(join_rows([make_row(scores={"gqa": 0.0})]))
    assert zero.cells[0][-1] == "0.00"


def test_an_interpreters_speed_stays_out_of_table_and_plot_but_is_told() -> None:
    lines = join_rows(rows_of_three_targets())
    table = result_table(lines)
    coreml = dict(zip(table.head, table.cells[3], strict=True))
    assert coreml["vision ms"] == coreml["peak MB"] == "–†" and coreml["GQA"] == "60.0" and coreml["size MB"] == "2.00"
    assert any("† student, coreml int4" in note and "vision 90.0 ms" in note for note in table.notes)
    figure = pareto_figure(lines)
    assert figure is not None
    latency = [
        trace["name"] for trace in figure["data"] if figure["buttons"][0]["visible"][figure["data"].index(trace)]
    ]
    assert latency == ["Pareto front", "onnx"]
    split = ttft_figure(lines)
    assert split is not None and not any("coreml" in label for label in split["data"][0]["y"])


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 50.0), (2.0, 50.0), (2.0, 70.0), (3.0, 60.0), (4.0, 90.0), (2.0, 70.0)]
    assert pareto_front(points) == [(1.0, 50.0), (2.0, 70.0), (4.0, 90.0)]
    assert pareto_front([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_the_undominated_set(seed: int) -> None:
    import random

    draw = random.Random(seed)
    points = [(float(draw.randint(0, 9)), float(draw.randint(0, 9))) for _ in range(30)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert set(pareto_front(points)) == set(points) - beaten


def test_the_page_loads_nothing_from_elsewhere_and_has_every_row() -> None:
    html = render_report(rows_of_three_targets(), [Path("results.json")])
    page = Page(html)
    assert page.loads == ["data:,"]
    assert not re.search(r"@import|url\(\s*['\"]?https?:", html[: html.index("<script>")])
    table = result_table(join_rows(rows_of_three_targets()))
    assert page.cells == [cell for row in table.cells for cell in row]
    assert "Plotly" in page.scripts[1] and len(page.scripts) == 3
    figures = json.loads(re.search(r"const figures = (.*);\n", page.scripts[2])[1])  # type: ignore[index]
    assert {"pareto", "ttft"} == set(figures)
    for wanted in ("Times exclude much.", "30.0, 31.0, 29.0", "29.0 to 31.0", "--new-tokens 8", "a processor", "llava"):
        assert wanted in html


def test_the_commands_make_the_results_again() -> None:
    rows = [make_row("a b", speeds=SPEEDS), make_row("c", speeds=SPEEDS), make_row("c", speeds=SPEEDS, threads=4)]
    flags = "--warmup 1 --repeats 3 --load-repeats 1 --prompt-tokens 60 --new-tokens 8 --threads"
    assert commands([*rows, make_row("c", scores=SIX)]) == [
        f"alignkd-bench run 'out/a b' out/c {flags} 1 --output results-1.json",
        f"alignkd-bench run out/c {flags} 4 --output results-2.json",
        "alignkd-bench accuracy out/c --data data --output accuracy-1.json",
        "alignkd-bench report results-1.json results-2.json accuracy-1.json --output report.html",
    ]


def test_the_page_without_scores_or_speeds_says_so() -> None:
    html = render_report([make_row(speeds=SPEEDS)])
    assert "No plot: no bundle has both" in html
    only = render_report([make_row(scores=SIX)])
    assert "scored only" in only and "Where the time to the first token goes" not in only


def test_a_name_cannot_become_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    html = render_report(
        [make_row(evil, speeds=SPEEDS, digest="ab" * 32), make_row(evil, scores=SIX, digest="ab" * 32)]
    )
    assert evil not in html and "<img" not in html
    assert Page(html).loads == ["data:,"]
    assert Page(html).cells[0] == evil


def test_markdown_and_text_hold_every_cell() -> None:
    table = result_table(join_rows(rows_of_three_targets()))
    wide, narrow = io.StringIO(), io.StringIO()
    to_text(table, Console(file=wide, width=40))
    to_text(table, Console(file=narrow, width=90, force_terminal=True, color_system=None))
    markdown = to_markdown(table)
    assert markdown.count("\n| ") == 1 + len(table.cells)
    for row in table.cells:
        assert "| " + " | ".join(row) + " |" in markdown
        assert any(all(cell in line for cell in row) for line in wide.getvalue().splitlines())
        assert sum(row[0] in line and row[1] in line for line in narrow.getvalue().splitlines()) >= 2
    assert "…" not in wide.getvalue() + narrow.getvalue()


@pytest.mark.parametrize(
    "value,text", [(0.0, "0.00"), (0.4567, "0.46"), (9.999, "10.00"), (12.34, "12.3"), (1234.5, "1234"), (None, DASH)]
)
def test_numbers_keep_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_no_rows_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="the results hold no rows"):
        join_rows([])


def test_missing_jinja_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"plotly.*pip install 'alignkd\[bench\]'"):
        write_report([make_row(speeds=SPEEDS)], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
