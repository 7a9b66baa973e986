"""alignkd-data: make the demo world, make the small real set, or check a LLaVA data set row by row."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from bundle.errors import UsageError, run_command
from distill.doctor import DataReport, Finding, LengthRule, check_data, checkpoint_tokens, counts

DESCRIPTION = "Data for distillation and scoring: make-demo and make-real write it, check finds faulty rows."
Directory = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class CheckConfig:
    """Dry-run a LLaVA JSON data set and name each faulty row.

    Looks for wrong fields, roles and order, empty answers, image markers that do not match the images, duplicate ids,
    missing or corrupt images, image names that leave the folder, and rows too long once the image is expanded. Exit
    code 0: no fault; 1: at least one row is faulty; 2: there is no such data set. EXIF-rotated images are warnings.
    """

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR_OR_JSON")]
    """LLaVA JSON, or a directory with train.json"""
    images: Path | None = None
    """folder of the images that the rows name; default: the JSON file's folder"""
    checkpoint: Path | None = None
    """count tokens with this checkpoint's tokenizer; default: words are counted, which finds fewer too long rows"""
    max_length: int = 2048
    """positions the model has"""
    visual_tokens: int = 144
    """positions one image takes (MobileVLM V2 at 336 px: 144)"""
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
    if min(config.max_length, config.visual_tokens) < 1 or config.show < 0:
        raise UsageError("--max-length and --visual-tokens must be at least 1, --show at least 0")
    tokens = None if config.checkpoint is None else checkpoint_tokens(config.checkpoint)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking rows", total=None)
        report = check_data(
            config.data,
            config.images,
            LengthRule(config.max_length, config.visual_tokens, tokens),
            lambda done, rows: progress.update(task, completed=done, total=rows),
        )
    _print_findings(report.faults, "fault", config.show)
    _print_findings(report.warnings, "warning", config.show)
    _print_summary(report)
    if config.json:
        print(jsonlib.dumps(_as_json(report)))
    return 1 if report.faults else 0


def _print_findings(findings: list[Finding], what: str, show: int) -> None:
    shown = findings[:show] if show else findings
    for found in shown:
        name = "" if found.id is None else f" (id '{found.id}')"
        print(f"{what}: row {found.row}{name}: {found.kind}: {found.message}")
    if len(shown) < len(findings):
        print(f"... and {len(findings) - len(shown)} more of {what}; --show 0 prints all")


def _print_summary(report: DataReport) -> None:
    print(
        f"{report.data}: {report.rows} rows ({report.with_image} with an image, {report.text_only} text only), "
        f"{report.images} images, longest row {'' if report.exact_lengths else 'at least '}{report.longest} positions"
    )
    for what, findings in (("faults", report.faults), ("warnings", report.warnings)):
        for kind, number in counts(findings).items():
            print(f"{what}: {kind}: {number}")
    print("no faults" if not report.faults else f"{report.faulty_rows} of {report.rows} rows are faulty")


def _as_json(report: DataReport) -> dict[str, object]:
    return {
        "data": str(report.data),
        "rows": report.rows,
        "with_image": report.with_image,
        "text_only": report.text_only,
        "images": report.images,
        "longest": report.longest,
        "exact_lengths": report.exact_lengths,
        "faulty_rows": report.faulty_rows,
        "fault_counts": counts(report.faults),
        "warning_counts": counts(report.warnings),
        "faults": [asdict(found) for found in report.faults],
        "warnings": [asdict(found) for found in report.warnings],
    }


def make_demo_world(config: MakeDemoConfig) -> int:
    """Write the demo world and print where."""
    if min(config.train_scenes, config.items) < 1:
        raise UsageError("--train-scenes and --items must be at least 1")
    from distill.demo_benchmarks import make_demo

    made = make_demo(config.output, config.seed, config.train_scenes, config.items)
    items = ", ".join(f"{name} {number}" for name, number in made.benchmarks.items())
    print(f"{made.train_turns} training questions in {made.train_rows} conversations; benchmarks: {items}")
    print(config.output)
    if config.json:
        print(jsonlib.dumps({**asdict(made), "output": str(config.output)}))
    return 0


def make_real_set(config: MakeRealConfig) -> int:
    """Write the real set and print where."""
    from distill.real_set import make_real

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
