"""Joined lines -> plotly figures as plain data: accuracy against cost, and where the first token's time goes."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime_bench.joined import Line, shared_benchmarks
from runtime_bench.report_table import MB, number
from runtime_bench.result import Quantity

Figure = dict[str, Any]  # plotly's JSON
Point = tuple[float, float]

# told apart with colour blindness too
COLOURS = {"onnx": "#2a78d6", "executorch": "#eb6834", "coreml": "#1baf7a", "coreai": "#5b3a8e"}
MARKERS = {"int4": "circle", "int8": "square", "fp16": "diamond", "fp32": "triangle-up"}
STAGES: tuple[tuple[str, Quantity, str], ...] = (
    ("image to pixels", "preprocess_ms", "#86b6ef"),
    ("prompt to ids", "prompt_ms", "#b3b1ab"),
    ("vision encoder", "vision_encode_ms", "#2a78d6"),
    ("embed", "embed_ms", "#eda100"),
    ("prefill", "prefill_ms", "#eb6834"),
    ("first token", "first_token_ms", "#1baf7a"),
)


@dataclass(frozen=True)
class Axis:
    """One choice of the plot's horizontal axis; less is better on each."""

    title: str
    value: Callable[[Line], float | None]
    interval: Callable[[Line], tuple[float, float] | None]


def _speed_axis(title: str, quantity: Quantity) -> Axis:
    def interval(line: Line) -> tuple[float, float] | None:
        if line.speed(quantity) is None or line.run is None:
            return None
        summary = line.run.measurements[quantity].summary
        return None if summary.low is None or summary.high is None else (summary.low, summary.high)

    return Axis(title, lambda line: line.speed(quantity), interval)


AXES: tuple[Axis, ...] = (
    _speed_axis("time to first token, ms", "ttft_ms"),
    _speed_axis("decode, ms per token", "decode_ms_per_token"),
    _speed_axis("vision encoder, ms", "vision_encode_ms"),
    Axis("peak memory, MB", lambda line: None if line.peak_bytes is None else line.peak_bytes / MB, lambda line: None),
    Axis("graph files, MB", lambda line: line.bundle.weights_bytes / MB, lambda line: None),
)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats on both sides (less x, more y), from the cheapest to the most accurate."""
    front: list[Point] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def pareto_figure(lines: Sequence[Line]) -> Figure | None:
    """Accuracy against each axis that has points, one shown at a time; None when no line has both."""
    shared = shared_benchmarks(lines)
    choices = [(axis, _traces(axis, lines, shared)) for axis in AXES]
    choices = [(axis, traces) for axis, traces in choices if traces]
    if not choices:
        return None
    data: list[Figure] = []
    owners: list[int] = []
    for i, (_, traces) in enumerate(choices):
        data += [{**trace, "visible": i == 0} for trace in traces]
        owners += [i] * len(traces)
    layout = {
        "height": 440,
        "margin": {"l": 64, "r": 24, "t": 44, "b": 60},
        "xaxis": {"title": {"text": choices[0][0].title}, "rangemode": "tozero", "automargin": True},
        "yaxis": {
            "title": {"text": "accuracy, %" if len(shared) == 1 else "mean accuracy, %"},
            "range": _room([y for trace in data for y in trace["y"]]),
            "automargin": True,
        },
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    }
    buttons = [
        {"label": axis.title, "visible": [owner == i for owner in owners]} for i, (axis, _) in enumerate(choices)
    ]
    return {"data": data, "layout": layout, "buttons": buttons}


def _room(values: list[float]) -> list[float]:
    """Range of an axis in percent: the values and space for their labels, never below zero."""
    margin = max(3.0, 0.12 * (max(values) - min(values)))
    return [max(0.0, min(values) - margin), max(values) + margin]


def _traces(axis: Axis, lines: Sequence[Line], shared: Sequence[str]) -> list[Figure]:
    placed: list[tuple[Line, float, float]] = []
    for line in lines:
        x, y = axis.value(line), line.mean_score(shared)
        if x is not None and y is not None:
            placed.append((line, x, y))
    if not placed:
        return []
    placed.sort(key=lambda item: (item[1], item[2]))
    front = pareto_front([(x, y) for _, x, y in placed])
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [x for x, _ in front],
            "y": [y for _, y in front],
            "line": {"color": "#898781", "width": 2, "dash": "dot", "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for target in sorted({line.bundle.target for line, _, _ in placed}):
        own = [item for item in placed if item[0].bundle.target == target]
        traces.append(_points(target, axis, own, front))
    return traces


def _points(target: str, axis: Axis, own: list[tuple[Line, float, float]], front: list[Point]) -> Figure:
    spans = [axis.interval(line) or (x, x) for line, x, _ in own]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": target,
        "x": [x for _, x, _ in own],
        "y": [y for _, _, y in own],
        "text": [_plain(f"{line.label} {line.bundle.precision}") for line, _, _ in own],
        # the front runs right of and below its points, so their labels stand above and the others' below
        "textposition": ["top center" if (x, y) in front else "bottom center" for _, x, y in own],
        "cliponaxis": False,
        "customdata": [_full_name(line) for line, _, _ in own],
        "hovertemplate": "%{customdata}<br>" + axis.title + ": %{x:.4g}<br>accuracy: %{y:.1f} %<extra></extra>",
        "marker": {
            "size": 12,
            "color": COLOURS[target],
            "symbol": [MARKERS[line.bundle.precision] for line, _, _ in own],
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(high - x, 0.0) for (_, high), (_, x, _) in zip(spans, own, strict=True)],
            "arrayminus": [max(x - low, 0.0) for (low, _), (_, x, _) in zip(spans, own, strict=True)],
            "thickness": 1,
            "width": 3,
        },
    }


def _full_name(line: Line) -> str:
    return _plain(f"{line.label}, {line.variant}")


def _plain(text: str) -> str:
    return html.escape(text, quote=False)  # plotly reads tags in labels


def ttft_figure(lines: Sequence[Line]) -> Figure | None:
    """Stacked bars: where the time to the first token goes, for every line that was run and not emulated."""
    timed = [line for line in reversed(lines) if line.speed("ttft_ms") is not None]
    if not timed:
        return None
    labels = [_full_name(line) for line in timed]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [line.speed(quantity) for line in timed],
            "marker": {"color": colour},
            "customdata": [number(line.speed(quantity)) for line in timed],
            "hovertemplate": "%{y}<br>" + name + ": %{customdata} ms<extra></extra>",
        }
        for name, quantity, colour in STAGES
    ]
    layout = {
        "barmode": "stack",
        "height": min(130 + 34 * len(timed), 640),
        "bargap": 0.35,
        "margin": {"l": 24, "r": 24, "t": 36, "b": 50},
        "xaxis": {"title": {"text": "median ms"}, "rangemode": "tozero"},
        "yaxis": {"automargin": True, "ticksuffix": "  "},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
    }
    return {"data": data, "layout": layout}
