"""results/*.json -> tables (Markdown on stdout) and a plot (SVG) of what each arm is worth against cross entropy.

python experiments/align_kd/report.py [--scenes N] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import GROUPS, by_group, mean_accuracy
from scipy.stats import ttest_rel

RESULTS = Path(__file__).parent / "results"
BASE = "ce"
# Who is held against whom besides cross entropy: the presets, and each against its controls.
PAIRS = (
    ("ours", "paper"),
    ("ours", "label smoothing"),
    ("ours", "ours, shuffled teacher"),
    ("ours", "ce, wall clock of ours"),
    ("ours", "ce, twice the steps"),
    ("ours, twice the steps", "ce, twice the steps"),
    ("ours", "forward KL, T 4"),
    ("paper", "label smoothing"),
    ("paper", "paper, shuffled teacher"),
    ("paper", "ce, twice the steps"),
    ("paper", "reverse KL"),
)
Run = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Paired differences from the base arm in points: mean and 95 % t interval (no interval from one seed)."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def read_runs(folder: Path, scenes: int) -> dict[str, dict[int, Run]]:
    """Arm -> seed -> its result, of training sets of so many conversations."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for path in sorted(folder.glob(f"*.{scenes}.*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[run["arm"]][run["seed"]] = run
    return runs


def difference(arm: dict[int, Run], base: dict[int, Run], split: str) -> Difference:
    """Of the mean accuracy on a split, over the seeds that both have."""
    seeds = sorted(set(arm) & set(base))
    ours, theirs = ([mean_accuracy(runs[seed]["accuracy"][split]) for seed in seeds] for runs in (arm, base))
    mean = statistics.mean(a - b for a, b in zip(ours, theirs, strict=True))
    if len(seeds) < 2 or arm is base:
        return Difference(mean, None, None)
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    return Difference(mean, float(interval.low), float(interval.high))


def overview(runs: dict[str, dict[int, Run]]) -> list[str]:
    """Accuracy and paired differences, best first."""
    base = runs[BASE]
    lines = [
        "| arm | seeds | test, % | against ce, points | unseen pairs, % | against ce, points | minutes a run |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    mean = {arm: _mean_accuracy(found, "test") for arm, found in runs.items()}
    for arm in sorted(runs, key=lambda arm: -mean[arm]):
        found = runs[arm]
        minutes = statistics.median(run["seconds"] for run in found.values()) / 60
        lines.append(
            f"| {arm} | {len(found)} | {mean[arm]:.1f} | {difference(found, base, 'test')} | "
            f"{_mean_accuracy(found, 'unseen'):.1f} | {difference(found, base, 'unseen')} | {minutes:.1f} |"
        )
    return lines


def pairs(runs: dict[str, dict[int, Run]]) -> list[str]:
    """Paired differences between two arms, on the seeds that both have."""
    lines = ["| arm | against | seeds | test, points | unseen pairs, points |", "|---|---|---:|---:|---:|"]
    for arm, other in PAIRS:
        if arm in runs and other in runs and (seeds := set(runs[arm]) & set(runs[other])):
            found = (str(difference(runs[arm], runs[other], split)) for split in ("test", "unseen"))
            lines.append(f"| {arm} | {other} | {len(seeds)} | {' | '.join(found)} |")
    return lines


def per_group(runs: dict[str, dict[int, Run]]) -> list[str]:
    """Test accuracy of each group of families."""
    lines = [f"| arm | {' | '.join(GROUPS)} |", f"|---|{'---:|' * len(GROUPS)}"]
    for arm, found in runs.items():
        groups = [by_group(run["accuracy"]["test"]) for run in found.values()]
        lines.append(f"| {arm} | {' | '.join(f'{statistics.mean(g[name] for g in groups):.1f}' for name in GROUPS)} |")
    return lines


def gradient_norms(runs: dict[str, dict[int, Run]]) -> list[str]:
    """Norm of each weighted term's gradient into the student at the start, in the middle and at the end."""
    lines = ["| arm | term | start | middle | end |", "|---|---|---:|---:|---:|"]
    for arm, found in runs.items():
        terms = [key for key in next(iter(found.values()))["gradient_norms"][0] if key != "step"]
        for term in terms:
            at = [statistics.mean(run["gradient_norms"][i][term] for run in found.values()) for i in (0, 1, 2)]
            lines.append(f"| {arm} | {term.removeprefix('gradient_norm/')} | {' | '.join(f'{v:.3g}' for v in at)} |")
    return lines


def plot(runs: dict[str, dict[int, Run]], path: Path) -> None:
    """Differences from the base arm with their intervals, every seed as a dot."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    base = runs[BASE]
    arms = sorted((arm for arm in runs if arm != BASE), key=lambda arm: difference(runs[arm], base, "test").mean)
    figure, axis = pyplot.subplots(figsize=(8, 0.42 * len(arms) + 1.2))
    axis.axvline(0, color="0.6", linewidth=1)
    for row, arm in enumerate(arms):
        found = difference(runs[arm], base, "test")
        if found.low is not None and found.high is not None:
            axis.plot([found.low, found.high], [row, row], color="tab:blue", linewidth=2)
        axis.plot(found.mean, row, "o", color="tab:blue")
        seeds = sorted(set(runs[arm]) & set(base))
        each = [
            mean_accuracy(runs[arm][s]["accuracy"]["test"]) - mean_accuracy(base[s]["accuracy"]["test"]) for s in seeds
        ]
        axis.plot(each, [row] * len(each), ".", color="0.45", markersize=4)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_xlabel("points against cross entropy (test scenes; mean, 95 % t interval, each seed)")
    figure.tight_layout()
    figure.savefig(path)


def _mean_accuracy(found: dict[int, Run], split: str) -> float:
    return statistics.mean(mean_accuracy(run["accuracy"][split]) for run in found.values())


def main() -> None:
    """Print the tables; write the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scenes", type=int, default=600, help="training conversations")
    parser.add_argument("--plot", type=Path)
    flags = parser.parse_args()
    runs = read_runs(flags.results, flags.scenes)
    for table in (overview(runs), pairs(runs), per_group(runs), gradient_norms(runs)):
        sys.stdout.write("\n".join(table) + "\n\n")
    if flags.plot is not None:
        plot(runs, flags.plot)


if __name__ == "__main__":
    main()
