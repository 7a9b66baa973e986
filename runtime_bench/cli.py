"""alignkd-bench: bundles -> rows of latency, memory and accuracy -> one report."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bundle.errors import UsageError, run_command
from bundle.staging import refuse_existing
from runtime_bench.accuracy.command import AccuracyConfig, ScoreConfig, accuracy, score
from runtime_bench.joined import join_rows
from runtime_bench.measure import MeasureSettings, check_bundle, measure_bundle
from runtime_bench.report_table import result_table, to_markdown, to_text
from runtime_bench.result import Row, read_results, write_results

DESCRIPTION = "Measure bundles (run), score them on the six benchmarks (accuracy), score answer files, report it all."


@dataclass(frozen=True)
class RunConfig(MeasureSettings):
    """Measure load, vision encoder, prefill, decode, time to first token and peak memory on this host.

    Every bundle runs in a process of its own. Warm-up runs are thrown away; every other sample is kept in --output,
    with the median and its 95 % bootstrap interval.
    """

    bundles: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="BUNDLE...")] = ()
    """directories that alignkd-export wrote"""
    output: Path = Path("results.json")
    """results file to write; must not exist"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout: the rows"""


@dataclass(frozen=True)
class ReportConfig:
    """Join the rows of results files by bundle, print the table, write one HTML file that opens offline."""

    results: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RESULTS...")]
    """files written by alignkd-bench run and alignkd-bench accuracy"""
    output: Path = Path("report.html")
    """HTML file to write; must not exist"""
    markdown: tyro.conf.FlagCreatePairsOff[bool] = False
    """print the table as markdown"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout: the report's path and the table"""


Command = (
    Annotated[RunConfig, tyro.conf.subcommand("run")]
    | Annotated[AccuracyConfig, tyro.conf.subcommand("accuracy")]
    | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
)


def run(config: RunConfig) -> int:
    """Measure each bundle; nothing is measured before every one of them was checked."""
    _at_least_one(config.bundles, "bundle", "run BUNDLE...")
    refuse_existing(config.output)
    for bundle in config.bundles:
        check_bundle(bundle, config.runtime)
    progress = Console(stderr=True)
    rows: list[Row] = []
    for i, bundle in enumerate(config.bundles, 1):
        with progress.status(f"measuring {bundle} ({i} of {len(config.bundles)})"):
            rows.append(measure_bundle(bundle, config))
        progress.print(f"measured {bundle} ({i} of {len(config.bundles)})", markup=False, highlight=False)
    write_results(config.output, rows)
    to_text(result_table(join_rows(rows)), Console())
    print(f"rows with all samples: {config.output}")
    if config.json:
        print(jsonlib.dumps({"output": str(config.output), "rows": [row.model_dump(mode="json") for row in rows]}))
    return 0


def report(config: ReportConfig) -> int:
    """Read every results file, print the joined table, write the page."""
    from runtime_bench.report import write_report

    _at_least_one(config.results, "results file", "report RESULTS...")
    rows = [row for path in config.results for row in read_results(path)]
    refuse_existing(config.output)
    table = result_table(join_rows(rows))
    write_report(rows, config.output, config.results)
    if config.markdown:
        print(to_markdown(table))
    else:
        to_text(table, Console())
    print(f"report: {config.output}")
    if config.json:
        cells = [dict(zip(table.head, row, strict=True)) for row in table.cells]
        print(jsonlib.dumps({"report": str(config.output), "table": cells, "notes": table.notes}))
    return 0


def _at_least_one(given: Sequence[Path], what: str, usage: str) -> None:
    if not given:
        raise UsageError(f"no {what} given; run: alignkd-bench {usage}")


def dispatch(config: RunConfig | AccuracyConfig | ScoreConfig | ReportConfig) -> int | None:
    """Run the command that the flags asked for."""
    if isinstance(config, RunConfig):
        return run(config)
    if isinstance(config, AccuracyConfig):
        return accuracy(config)
    if isinstance(config, ScoreConfig):
        return score(config)
    return report(config)


def main() -> None:
    """Entry point of alignkd-bench."""
    run_command(lambda: dispatch(tyro.cli(Command, prog="alignkd-bench", description=DESCRIPTION)))


if __name__ == "__main__":
    main()
