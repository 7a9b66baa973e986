"""Samples -> medians per engine and thread count, Markdown with each peer's ratio to our best, and the aims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from engines.rounds import Contestant, Sample, Work

MEGABYTE = 1e6


@dataclass(frozen=True)
class Column:
    """One quantity of the table.

    Attributes:
        part: which processes it comes from.
        higher: whether more is better.
    """

    name: str
    part: str
    higher: bool
    digits: int
    value: Callable[[Sample, Work], Sequence[float]]


def _of(sample: Sample, name: str) -> list[float]:
    return list(vars(sample.answer)[name])


COLUMNS: dict[str, Column] = {
    "vision_s": Column("vision s", "vision", False, 2, lambda s, w: _of(s, "encode_s")),
    "prefill": Column(
        "prefill tokens/s", "text", True, 0, lambda s, w: [w.prompt_tokens / t for t in _of(s, "prefill_s")]
    ),
    "decode": Column("decode tokens/s", "text", True, 1, lambda s, w: [w.new_tokens / t for t in _of(s, "decode_s")]),
    "load_s": Column("load s", "text", False, 2, lambda s, w: [s.answer.load_s] if s.answer else []),
    "peak_mb": Column("peak MB", "text", False, 0, lambda s, w: [s.answer.peak_bytes / MEGABYTE] if s.answer else []),
    "vision_peak_mb": Column(
        "vision peak MB", "vision", False, 0, lambda s, w: [s.answer.peak_bytes / MEGABYTE] if s.answer else []
    ),
}
Medians = dict[str, dict[str, float]]  # label -> quantity -> median


def medians(samples: Sequence[Sample], work: Work, threads: int) -> Medians:
    """Median over all processes and runs of each engine at one number of threads."""
    found: Medians = {}
    for quantity, column in COLUMNS.items():
        for label in dict.fromkeys(sample.label for sample in samples):
            mine = [s for s in samples if (s.label, s.part, s.threads) == (label, column.part, threads) and s.answer]
            values = [value for sample in mine for value in column.value(sample, work)]
            if values:
                found.setdefault(label, {})[quantity] = median(values)
    return found


def file_megabytes(contestant: Contestant) -> dict[str, float]:
    """Size of each part's files; where one file holds all, it counts as text's."""
    return {part: sum(p.stat().st_size for p in files) / MEGABYTE for part, files in contestant.files.items() if files}


def best(found: Medians, labels: Sequence[str], quantity: str) -> float | None:
    """The best of some engines at a quantity, None where none has it."""
    values = [found[label][quantity] for label in labels if quantity in found.get(label, {})]
    if not values:
        return None
    return max(values) if COLUMNS[quantity].higher else min(values)


def markdown(found: Medians, contestants: Sequence[Contestant], threads: int) -> str:
    """A row per engine; behind a peer's value its ratio to the best of ours."""
    ours = [contestant.label for contestant in contestants if contestant.ours]
    heads = ["engine", *(column.name for column in COLUMNS.values()), "text files MB", "vision files MB"]
    lines = [f"{threads} thread" + "s" * (threads > 1), "", "| " + " | ".join(heads) + " |"]
    lines.append("|---" + "|---:" * (len(heads) - 1) + "|")
    for contestant in contestants:
        cells = [f"**{contestant.label}**" if contestant.ours else contestant.label]
        for quantity, column in COLUMNS.items():
            value = found.get(contestant.label, {}).get(quantity)
            reference = best(found, ours, quantity)
            shown = "–" if value is None else f"{value:.{column.digits}f}"
            if value is not None and reference is not None and not contestant.ours:
                shown += f" ({value / reference:.2f}x)"
            cells.append(shown)
        sizes = file_megabytes(contestant)
        cells += [f"{sizes[part]:.0f}" if part in sizes else "–" for part in ("text", "vision")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Aim:
    """Our best against one peer, or the best of all: ``ours`` times ``factor`` of theirs."""

    quantity: str
    peer: str | None
    factor: float

    def line(self, found: Medians, labels: Mapping[str, str], ours: Sequence[str]) -> str | None:
        """What was aimed at and what is, or None where one side was not measured."""
        peers = [labels[self.peer]] if self.peer in labels else []
        if self.peer is None:
            peers = list(labels.values())
        mine, theirs = best(found, ours, self.quantity), best(found, peers, self.quantity)
        if mine is None or theirs is None:
            return None
        column = COLUMNS[self.quantity]
        ratio = mine / theirs
        met = ratio >= self.factor if column.higher else ratio <= self.factor
        bound = "at least" if column.higher else "at most"
        who = self.peer or "the best peer"
        return f"- {column.name}: {ratio:.2f}x of {who} (aim: {bound} {self.factor}x): {'met' if met else 'missed'}"


AIMS = (
    Aim("vision_s", "llama.cpp", 0.25),
    Aim("vision_s", "openvino", 1.0),
    Aim("prefill", "llama.cpp", 1.5),
    Aim("prefill", "openvino", 0.85),
    Aim("decode", None, 1.15),
    Aim("peak_mb", "mnn", 1.1),
)


def aims(found: Medians, contestants: Sequence[Contestant], labels: Mapping[str, str]) -> str:
    """A line per aim, and one on the files.

    Args:
        labels: peer's name -> its label.
    """
    ours = [contestant.label for contestant in contestants if contestant.ours]
    lines = [line for aim in AIMS if (line := aim.line(found, labels, ours)) is not None]
    sizes = {contestant.label: sum(file_megabytes(contestant).values()) for contestant in contestants}
    mine = min((sizes[label] for label in ours), default=None)
    theirs = sizes.get(labels.get("llama.cpp", ""))
    if mine is not None and theirs is not None:
        verdict = "met" if mine <= theirs else "missed"
        lines.append(f"- files, text and vision: {mine / theirs:.2f}x of llama.cpp (aim: at most 1x): {verdict}")
    return "\n".join(lines)
