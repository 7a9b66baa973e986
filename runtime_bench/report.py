"""Rows -> one HTML file that opens offline: table, Pareto plot, time split, conditions, how to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import missing_extra
from bundle.staging import write_text_whole
from runtime_bench.joined import Line, all_benchmarks, join_rows, shared_benchmarks
from runtime_bench.plots import Figure, pareto_figure, ttft_figure
from runtime_bench.report_table import DASH, MB, TITLES, number, result_table
from runtime_bench.result import Row, Settings, Summary, now

TEMPLATE = "report.html.j2"
TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Detail:
    """One quantity of one line: median, interval, number of samples, and the samples themselves as text."""

    quantity: str
    median: str
    interval: str
    n: int
    samples: str


@dataclass(frozen=True)
class Section:
    """What the page says of one line below the table."""

    line: Line
    details: tuple[Detail, ...]
    memory: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BenchmarkNote:
    """How one benchmark was scored, over all lines."""

    title: str
    protocols: str
    answers: str
    warnings: tuple[str, ...]


def write_report(rows: Sequence[Row], output: Path, sources: Sequence[Path] = ()) -> None:
    """Write the report of ``rows`` to ``output``; ``sources`` are the results files they came from."""
    write_text_whole(output, render_report(rows, sources))


def render_report(rows: Sequence[Row], sources: Sequence[Path] = ()) -> str:
    """The whole page as text."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise missing_extra(str(error.name), "bench") from error
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    lines = join_rows(rows)
    figures = {"pareto": pareto_figure(lines), "ttft": ttft_figure(lines)}
    return environment.get_template(TEMPLATE).render(
        made=now(),
        lines=lines,
        table=result_table(lines),
        figures=figures,
        figures_json=Markup(script_json(figures)),
        plotly_js=Markup(get_plotlyjs()) if any(figures.values()) else "",
        sections=[Section(line, details(line), memory_cells(line.run)) for line in lines],
        shared=[TITLES.get(name, name) for name in shared_benchmarks(lines)],
        benchmarks=[benchmark_note(name, lines) for name in all_benchmarks(lines)],
        excludes=sorted({row.excludes for row in rows if row.excludes}),
        commands=commands(rows),
        sources=[str(path) for path in sources],
        dash=DASH,
    )


def script_json(figures: dict[str, Figure | None]) -> str:
    """JSON that may stand inside a script element: a name in it cannot end the element or open a comment."""
    text = json.dumps(figures, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def details(line: Line) -> tuple[Detail, ...]:
    """Every quantity of a line that was run."""
    if line.run is None:
        return ()
    return tuple(
        Detail(
            quantity=quantity,
            median=number(found.summary.median),
            interval=interval(found.summary),
            n=found.summary.n,
            samples=", ".join(number(value) for value in found.samples),
        )
        for quantity, found in line.run.measurements.items()
    )


def benchmark_note(name: str, lines: Sequence[Line]) -> BenchmarkNote:
    """Protocol, number of answers and warnings of one benchmark."""
    scores = [line.scores[name] for line in lines if name in line.scores]
    answers = sorted({f"{score.n_scored} of {score.n_expected}" for score in scores})
    warnings = {
        f"{line.label}, {line.variant}: {text}"
        for line in lines
        if name in line.scores
        for text in line.scores[name].warnings
    }
    return BenchmarkNote(
        TITLES.get(name, name),
        ", ".join(sorted({score.protocol for score in scores})),
        ", ".join(answers),
        tuple(sorted(warnings)),
    )


def interval(summary: Summary) -> str:
    """The bootstrap interval, or a dash where one sample gave none."""
    if summary.low is None or summary.high is None:
        return DASH
    return f"{number(summary.low)} to {number(summary.high)}"


def memory_cells(run: Row | None) -> tuple[tuple[str, str], ...]:
    """The memory of a run in MB, by what it means."""
    if run is None or run.memory is None:
        return ()
    memory = run.memory
    cells: list[tuple[str, int | None]] = [
        ("peak memory (VmHWM)", memory.peak_bytes),
        ("before the engine", memory.baseline_bytes),
        ("private at the end", memory.anonymous_bytes),
        ("mapped files at the end", memory.file_bytes),
    ]
    return tuple((name, number(None if value is None else value / MB)) for name, value in cells)


def commands(rows: Sequence[Row]) -> list[str]:
    """The commands that make these results again: a run per set of settings, one accuracy per row, the report."""
    runs: dict[str, list[str]] = {}
    scored: dict[str, str] = {}
    for row in rows:
        if row.settings is not None:
            runs.setdefault(_flags(row.settings), []).append(shlex.quote(row.bundle.path))
        if row.accuracy is not None:
            output = f"accuracy-{len(scored) + 1}.json"
            data = shlex.quote(row.accuracy.data)
            scored[output] = f"alignkd-bench accuracy {shlex.quote(row.bundle.path)} --data {data} --output {output}"
    measured = {
        f"results-{i}.json": f"alignkd-bench run {' '.join(dict.fromkeys(paths))} {flags} --output results-{i}.json"
        for i, (flags, paths) in enumerate(runs.items(), 1)
    }
    report = f"alignkd-bench report {' '.join([*measured, *scored])} --output report.html"
    return [*measured.values(), *scored.values(), report]


def _flags(settings: Settings) -> str:
    flags = f"--warmup {settings.warmup} --repeats {settings.repeats} --load-repeats {settings.load_repeats}"
    flags += f" --prompt-tokens {settings.prompt_tokens} --new-tokens {settings.new_tokens}"
    return flags if settings.threads is None else f"{flags} --threads {settings.threads}"
