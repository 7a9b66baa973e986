"""alignkd-data: make the demo world, make the small real set, or check a data set row by row."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bundle.errors import UsageError, run_command
from distill.data_doctor.doctor import ImageRule, check_data
from distill.data_doctor.findings import DataReport, Finding, Findings
from distill.data_doctor.image_hash import HASH_DISTANCE
from distill.data_doctor.row_check import LengthRule, checkpoint_encoder

DESCRIPTION = "Data for distillation and scoring: make-demo and make-real write it, check finds faulty rows."
MOST_DISTANCE = 32  # of 128 bits; pictures that have nothing in common differ in about 33 and more
LINE_EVERY = 50_000  # rows or images, where stderr is no terminal
Directory = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class CheckConfig:
    """Dry-run a data set (LLaVA JSON, Hugging Face messages, tar shards) and name each faulty row.

    Looks for wrong fields, roles and order, empty answers, image markers that do not match the images, duplicate ids,
    missing or corrupt images, image names that leave the folder, rows too long once the image is expanded, and, with
    --benchmarks, images that a benchmark shows. With --checkpoint also for rows in which every label would be masked.
    Exit code 0: no fault; 1: at least one row is faulty; 2: there is no such data set. Images that are EXIF-rotated or
    copies of others are warnings.
    """

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """JSON, JSON lines, parquet, tar shards such as s-{000000..000123}.tar, or a directory with train.json or shards"""
    images: Path | None = None
    """folder of the images that the rows name; default: the data file's folder"""
    checkpoint: Path | None = None
    """count tokens with this checkpoint's tokenizer; default: words are counted, which finds fewer too long rows"""
    max_length: int = 2048
    """positions the model has"""
    visual_tokens: int = 144
    """positions one image takes (MobileVLM V2 at 336 px: 144)"""
    benchmarks: tuple[Path, ...] = ()
    """folders of benchmarks, in their own layouts, whose pictures must not be in the data"""
    hash_distance: int = HASH_DISTANCE
    """bits of 128 in which the hashes of like pictures may differ: 8 covers JPEG quality 30 and half the size"""
    workers: int = 0
    """processes that check rows and decode images; 0: one per processor, and none beside this one below 1000 rows"""
    show: int = 50
    """faults and warnings printed; 0 prints all (--json has them all)"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout"""


@dataclass(frozen=True)
class MakeDemoConfig:
    """Write the procedural demo world: LLaVA training JSON, images, the six benchmarks in their real formats."""

    output: Directory
    """new directory"""
    seed: int = 0
    """of every random choice; the same seed writes the same bytes"""
    train_scenes: int = 3000
    """pictures to train on"""
    items: int = 60
    """test items per benchmark"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout"""


@dataclass(frozen=True)
class MakeRealConfig:
    """Write 30 hand-written questions on pictures of scikit-image's wheel: train.json, test.json, benchmarks/gqa."""

    output: Directory
    """new directory"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout"""


Command = (
    Annotated[CheckConfig, tyro.conf.subcommand("check")]
    | Annotated[MakeDemoConfig, tyro.conf.subcommand("make-demo")]
    | Annotated[MakeRealConfig, tyro.conf.subcommand("make-real")]
)


def check(config: CheckConfig) -> int:
    """Print what is wrong; 1 when any row is faulty."""
    if min(config.max_length, config.visual_tokens) < 1 or min(config.show, config.workers) < 0:
        raise UsageError("--max-length and --visual-tokens must be at least 1, --show and --workers at least 0")
    if not 0 <= config.hash_distance <= MOST_DISTANCE:
        raise UsageError(f"--hash-distance {config.hash_distance} must be from 0 to {MOST_DISTANCE}, of 128 bits")
    if config.checkpoint is not None:
        checkpoint_encoder(config.checkpoint)  # before hours of work, not in the middle of them
    with _Stages(Console(stderr=True)) as stages:
        report = check_data(
            config.data,
            config.images,
            LengthRule(config.max_length, config.visual_tokens, config.checkpoint),
            ImageRule(config.benchmarks, config.hash_distance, config.workers),
            stages.show,
        )
    _print_findings(report.all_faults, "fault", config.show)
    _print_findings(report.all_warnings, "warning", config.show)
    _print_summary(report)
    if config.json:
        print(jsonlib.dumps(report.as_json()))
    return 1 if report.faults else 0


class _Stages(Progress):
    """A bar a stage on a terminal; elsewhere a line for each tenth of a long one."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bars: dict[str, TaskID] = {}
        self._shown = 0

    def show(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` (0: not known) in the stage ``what``."""
        if what not in self._bars:
            self._bars[what], self._shown = self.add_task(what, total=None), 0
        self.update(self._bars[what], completed=done, total=total or None)
        if not self.console.is_terminal and done - self._shown >= max(LINE_EVERY, total // 10):
            self._shown = done
            self.console.print(f"{what}: {done}{f' of {total}' if total else ''}", soft_wrap=True)


def _print_findings(findings: Findings, what: str, show: int) -> None:
    shown: list[Finding] = findings.listed[:show] if show else findings.listed
    for found in shown:
        name = "" if found.id is None else f" (id '{found.id}')"
        print(f"{what}: row {found.row}{name}: {found.kind}: {found.message}")
    if more := len(findings.listed) - len(shown):
        print(f"... and {more} more of {what}; --show 0 prints all")
    if findings.left_out:
        print(f"... and {findings.left_out} more of {what}, counted only")


def _print_summary(report: DataReport) -> None:
    print(
        f"{report.data}: {report.rows} rows ({report.with_image} with an image, {report.text_only} text only), "
        f"{report.images} images, longest row {'' if report.exact_lengths else 'at least '}{report.longest} positions"
    )
    if report.benchmark_pictures:
        print(f"compared with {report.benchmark_pictures} pictures of benchmarks")
    for what, findings in (("faults", report.all_faults), ("warnings", report.all_warnings)):
        for kind, number in findings.by_kind().items():
            print(f"{what}: {kind}: {number}")
    print("no faults" if not report.faults else f"{report.faulty_rows} of {report.rows} rows are faulty")


def make_demo_world(config: MakeDemoConfig) -> int:
    """Write the demo world and print where."""
    if min(config.train_scenes, config.items) < 1:
        raise UsageError("--train-scenes and --items must be at least 1")
    from distill.demo_world.demo_benchmarks import make_demo

    made = make_demo(config.output, config.seed, config.train_scenes, config.items)
    items = ", ".join(f"{name} {number}" for name, number in made.benchmarks.items())
    print(f"{made.train_turns} training questions in {made.train_rows} conversations; benchmarks: {items}")
    print(config.output)
    if config.json:
        print(jsonlib.dumps({**asdict(made), "output": str(config.output)}))
    return 0


def make_real_set(config: MakeRealConfig) -> int:
    """Write the real set and print where."""
    from distill.real_set.real_set import make_real

    made = make_real(config.output)
    print(f"{made.train} training and {made.test} test questions on {made.pictures} pictures: {made.output}")
    if config.json:
        print(jsonlib.dumps({**asdict(made), "output": str(made.output)}))
    return 0


def dispatch(config: CheckConfig | MakeDemoConfig | MakeRealConfig) -> int:
    """Run the command that the flags asked for."""
    if isinstance(config, CheckConfig):
        return check(config)
    return make_demo_world(config) if isinstance(config, MakeDemoConfig) else make_real_set(config)


def main() -> None:
    """Entry point of alignkd-data."""
    run_command(lambda: dispatch(tyro.cli(Command, prog="alignkd-data", description=DESCRIPTION)))


if __name__ == "__main__":
    main()
