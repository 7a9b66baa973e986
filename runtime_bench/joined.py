"""Rows of several results files -> one line per measured bundle, speed and memory beside its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from bundle.errors import UsageError
from runtime_bench.result import BENCHMARKS, BenchmarkScore, BundleRef, Quantity, Row

MME_FULL_MARKS = 20.0  # MME perception runs to 2000; published averages count MME / 20 as a percentage


@dataclass(frozen=True)
class Line:
    """One bundle on one device and setting. A part that was not measured is None or empty, never zero."""

    bundle: BundleRef
    run: Row | None
    scored: tuple[Row, ...]
    scores: dict[str, BenchmarkScore]
    sibling: str = ""  # what tells this run from another run of the same bundle

    @property
    def label(self) -> str:
        """The bundle's name without its variant, and what tells it from another run of the same bundle."""
        name, target, precision = self.bundle.name, f"-{self.bundle.target}", f"-{self.bundle.precision}"
        name = name.removesuffix(target).removesuffix(precision).removesuffix(target) or self.bundle.name
        return f"{name} ({self.sibling})" if self.sibling else name

    @property
    def variant(self) -> str:
        """Target and precision."""
        return f"{self.bundle.target} {self.bundle.precision}"

    @property
    def emulated(self) -> bool:
        """Speeds were taken by an interpreter and stay out of tables and plots."""
        return self.run is not None and self.run.emulated

    def speed(self, quantity: Quantity) -> float | None:
        """Median of a quantity; None when not measured or emulated."""
        return None if self.run is None or self.run.emulated else self.run.median(quantity)

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory; None when not measured or emulated."""
        return None if self.run is None or self.run.emulated or self.run.memory is None else self.run.memory.peak_bytes

    def mean_score(self, benchmarks: Sequence[str]) -> float | None:
        """Mean over ``benchmarks`` in percent; None when one of them is missing."""
        if not benchmarks or any(name not in self.scores for name in benchmarks):
            return None
        return sum(percent(name, self.scores[name].score) for name in benchmarks) / len(benchmarks)


def percent(benchmark: str, score: float) -> float:
    """A published score in percent: MME / 20, the others as they are."""
    return score / MME_FULL_MARKS if benchmark == "mme" else score


def join_rows(rows: Sequence[Row]) -> list[Line]:
    """Join rows of the same bundle by the hash of its manifest, in the order they were given.

    Every ``run`` row is a line of its own (another device, other settings); a bundle that was only scored is one line.

    Raises:
        UsageError: there is nothing to show, or one benchmark was scored twice on a bundle with different results.
    """
    if not rows:
        raise UsageError("the results hold no rows; measure a bundle with: alignkd-bench run BUNDLE")
    order = {sha: i for i, sha in reversed(list(enumerate(row.bundle.manifest_sha256 for row in rows)))}
    by_bundle = sorted(rows, key=lambda row: order[row.bundle.manifest_sha256])
    lines: list[Line] = []
    for _, group in groupby(by_bundle, key=lambda row: row.bundle.manifest_sha256):
        same = list(group)
        runs = [row for row in same if row.measurements]
        scored = tuple(row for row in same if row.accuracy is not None)
        scores = _merge(scored)
        siblings = _siblings(runs)
        lines += [Line(run.bundle, run, scored, scores, name) for run, name in zip(runs, siblings, strict=True)]
        if not runs:
            lines.append(Line(same[0].bundle, None, scored, scores))
    return lines


def _siblings(runs: Sequence[Row]) -> list[str]:
    if len(runs) < 2:
        return [""] * len(runs)
    names = [f"{_threads(run)} threads, {run.device.cpu}" for run in runs]
    return (
        names
        if len(set(names)) == len(names)
        else [f"{name}, {run.time}" for name, run in zip(names, runs, strict=True)]
    )


def _threads(run: Row) -> str:
    return "default" if run.settings is None or run.settings.threads is None else str(run.settings.threads)


def _merge(scored: Sequence[Row]) -> dict[str, BenchmarkScore]:
    merged: dict[str, BenchmarkScore] = {}
    for row in scored:
        assert row.accuracy is not None
        for name, score in row.accuracy.benchmarks.items():
            known = merged.setdefault(name, score)
            if (known.score, known.n_scored, known.protocol) != (score.score, score.n_scored, score.protocol):
                raise UsageError(
                    f"bundle {row.bundle.name} ({row.bundle.manifest_sha256[:12]}) has two results for {name}: "
                    f"{known.score:g} on {known.n_scored} items and {score.score:g} on {score.n_scored}; "
                    "give one of the two results files"
                )
    return {name: merged[name] for name in sorted(merged, key=_rank)}


def _rank(benchmark: str) -> tuple[int, str]:
    return (BENCHMARKS.index(benchmark) if benchmark in BENCHMARKS else len(BENCHMARKS), benchmark)


def all_benchmarks(lines: Sequence[Line]) -> list[str]:
    """Every benchmark that some line has, in the published order."""
    return sorted({name for line in lines for name in line.scores}, key=_rank)


def shared_benchmarks(lines: Sequence[Line]) -> list[str]:
    """The benchmarks that every scored line has: only over these are means comparable."""
    scored = [set(line.scores) for line in lines if line.scores]
    return sorted(set.intersection(*scored), key=_rank) if scored else []
