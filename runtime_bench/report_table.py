"""Joined lines -> the results table, as cells, terminal text or markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from runtime_bench.joined import Line, all_benchmarks, shared_benchmarks
from runtime_bench.result import Quantity, Row

DASH = "–"
EMULATED = "†"
MB = 1e6
GAP = 2  # blanks between columns
TITLES = {"gqa": "GQA", "sqa": "SQA", "textvqa": "TextVQA", "pope": "POPE", "mme": "MME", "mmbench": "MMB"}
SPEEDS: tuple[tuple[str, Quantity], ...] = (
    ("cold load ms", "cold_load_ms"),
    ("vision ms", "vision_encode_ms"),
    ("TTFT ms", "ttft_ms"),
    ("prefill tok/s", "prefill_tokens_per_s"),
    ("decode tok/s", "decode_tokens_per_s"),
)


@dataclass(frozen=True)
class ResultTable:
    """Head and cells as text; the first two columns are words, the rest numbers; notes belong under the table."""

    head: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def result_table(lines: Sequence[Line]) -> ResultTable:
    """Latency and memory next to accuracy, a line per bundle; what was not measured is a dash."""
    benchmarks, shared = all_benchmarks(lines), shared_benchmarks(lines)
    head = ["bundle", "variant", "size MB", *(title for title, _ in SPEEDS), "peak MB"]
    head += [TITLES.get(name, name) for name in benchmarks]
    if len(shared) > 1:
        head.append("mean")
    cells = [_cells(line, benchmarks, shared) for line in lines]
    return ResultTable(tuple(head), tuple(cells), tuple(_notes(lines, benchmarks, shared)))


def _cells(line: Line, benchmarks: Sequence[str], shared: Sequence[str]) -> tuple[str, ...]:
    blank = DASH + EMULATED if line.emulated else DASH
    speeds = [number(line.speed(quantity), blank) for _, quantity in SPEEDS]
    peak = number(None if line.peak_bytes is None else line.peak_bytes / MB, blank)
    scores = [number(line.scores[name].score if name in line.scores else None) for name in benchmarks]
    mean = [number(line.mean_score(shared))] if len(shared) > 1 else []
    return (line.label, line.variant, number(line.bundle.weights_bytes / MB), *speeds, peak, *scores, *mean)


def number(value: float | None, blank: str = DASH) -> str:
    """Three or four significant digits without an exponent; ``blank`` for what was not measured."""
    if value is None:
        return blank
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _notes(lines: Sequence[Line], benchmarks: Sequence[str], shared: Sequence[str]) -> list[str]:
    notes = ["size MB: the graph files; tokenizer, manifest and golden vectors are not counted."]
    if any(line.peak_bytes is not None for line in lines):
        notes.append(
            "peak MB: the whole process, Python and the engine's bindings included (ExecuTorch's load torch); "
            "a phone's app has neither, so compare within a target."
        )
    if any(cell is None for line in lines for cell in (line.run, line.scores or None)):
        notes.append(f"{DASH} not measured (alignkd-bench run gives speed, alignkd-bench accuracy gives scores).")
    notes += [_emulated_note(line) for line in lines if line.emulated]
    notes += [note for line in lines if line.run is not None and (note := _prefix_note(line.label, line.run))]
    if "mme" in benchmarks:
        notes.append("MME is the perception score (0 to 2000); it counts as MME / 20 in the mean.")
    partial = sorted(
        {name for line in lines for name, score in line.scores.items() if score.n_scored < score.n_expected}
    )
    if partial:
        notes.append(f"Fewer answers than questions in: {', '.join(TITLES.get(name, name) for name in partial)}.")
    if len(shared) > 1 and len(shared) < len(benchmarks):
        notes.append(f"The mean is over the benchmarks that every scored bundle has: {', '.join(shared)}.")
    return notes


def _prefix_note(label: str, run: Row) -> str | None:
    """What the bundle's prefix cache is worth."""
    cached, whole = run.median("ttft_ms"), run.median("ttft_whole_prefill_ms")
    if cached is None or whole is None or run.settings is None:
        return None
    return (
        f"{label}: {run.settings.known_tokens} of {run.settings.prompt_tokens} prompt rows come from its prefix cache; "
        f"TTFT {number(cached)} ms instead of {number(whole)} ({whole / cached:.2f}x)."
    )


def _emulated_note(line: Line) -> str:
    assert line.run is not None
    parts = [f"vision {number(line.run.median('vision_encode_ms'))} ms"]
    parts.append(f"decode {number(line.run.median('decode_tokens_per_s'))} tok/s")
    if line.run.memory is not None:
        parts.append(f"peak {number(line.run.memory.peak_bytes / MB)} MB")
    return (
        f"{EMULATED} {line.label}, {line.variant}: run by {line.run.runtime} ({line.run.covers}), {', '.join(parts)}. "
        "That is the interpreter's speed, not the target's, so it stays out of table and plot."
    )


def to_text(table: ResultTable, console: Console) -> None:
    """Print the table and its notes; on a terminal too narrow for it, speed and accuracy come one below the other."""
    columns = list(range(len(table.head)))
    cut = 2 + 1 + len(SPEEDS) + 1  # words, size, speeds, peak
    whole = not console.is_terminal or _width(table, columns) <= console.width or cut == len(columns)
    for part in [columns] if whole else [columns[:cut], columns[:2] + columns[cut:]]:
        drawn = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
        for i in part:
            drawn.add_column(_two_lines(table.head[i]), justify="left" if i < 2 else "right", vertical="bottom")
        for cells in table.cells:
            drawn.add_row(*(escape(cells[i]) for i in part))
        width, console.width = console.width, max(console.width, _width(table, part))  # never squeeze a number
        console.print(drawn)
        console.width = width
        if part != columns:
            console.print()
    for note in table.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _two_lines(title: str) -> str:
    return "\n".join(title.rsplit(" ", 1))


def _width(table: ResultTable, columns: Sequence[int]) -> int:
    rows = [[part for part in _two_lines(title).split("\n")] for title in table.head]
    widest = [max(map(len, [*rows[i], *(cells[i] for cells in table.cells)])) for i in columns]
    return sum(widest) + GAP * len(columns)


def to_markdown(table: ResultTable) -> str:
    """The table as GitHub markdown, notes below."""
    rule = ["---"] * 2 + ["---:"] * (len(table.head) - 2)
    rows = [table.head, rule, *table.cells]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([text, *(f"\n{note}" for note in table.notes)]) + "\n"
