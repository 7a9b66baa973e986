"""alignkd-doctor -> what is installed, which targets work here, the first broken layer; exit 0 or 1."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bundle.dependencies import EXTRAS, Found, of_extra
from bundle.doctor import LAYERS, TARGETS, Diagnosis, TargetReport, diagnose
from bundle.errors import run_command

GIB = 1 << 30


@dataclass(frozen=True)
class DoctorConfig:
    """Say what is installed beside what was tested, and try every target: export a tiny model and run it.

    Takes under a minute. A missing extra is named with the command that installs it and is no fault. Exit code 0: all
    that is installed works; 1: something installed is broken; its first broken layer is named with what mends it.
    """

    target: Annotated[tuple[Literal["onnx", "executorch", "coreml", "coreai"], ...], tyro.conf.UseAppendAction] = ()
    """try only this target; may be repeated; default: all"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """end with one line of JSON on stdout"""


def doctor(config: DoctorConfig) -> int:
    """Examine this host and print what was found."""
    with Console(stderr=True).status("trying each target (under a minute) ..."):
        diagnosis = diagnose(config.target or TARGETS)
    console = Console()
    _print_host(console, diagnosis)
    _print_dependencies(console, diagnosis.dependencies)
    _print_targets(console, diagnosis.targets)
    for line in _conclusions(diagnosis):
        console.print(escape(line), soft_wrap=True, highlight=False)
    if config.json:
        print(json.dumps(_as_json(diagnosis)))
    return 1 if diagnosis.first_broken else 0


def _print_host(console: Console, diagnosis: Diagnosis) -> None:
    host = diagnosis.host
    console.print(escape(f"Python {host.python} on {host.platform}"), soft_wrap=True, highlight=False)
    memory = f"{host.memory_bytes / GIB:.1f} GiB of memory"
    console.print(escape(f"{host.cpu}, {host.cores} cores, {memory}"), soft_wrap=True, highlight=False)


def _print_dependencies(console: Console, dependencies: tuple[Found, ...]) -> None:
    table = Table(title="dependencies", title_justify="left")
    for heading in ("package", "required", "tested", "found", "", "needed by"):
        table.add_column(heading)
    for found in dependencies:
        dependency = found.dependency
        needed_by = ", ".join(dependency.extras) or "alignkd itself"
        table.add_row(
            dependency.package, dependency.requirement, dependency.tested, found.version or "-", found.state, needed_by
        )
    console.print(table)


def _print_targets(console: Console, targets: tuple[TargetReport, ...]) -> None:
    table = Table(title="targets", title_justify="left")
    for heading in ("target", *LAYERS, "verdict"):
        table.add_column(heading)
    for report in targets:
        failed = next((layer for layer in LAYERS if layer not in report.layers_s), None)
        cells = [f"{report.layers_s[layer]:.1f} s" if layer in report.layers_s else "-" for layer in LAYERS]
        if report.state == "broken":
            cells[LAYERS.index(str(failed))] = "BROKEN"
        verdict = f"works on {report.runtime} ({report.covers})" if report.state == "works" else report.state
        table.add_row(report.target, *cells, escape(verdict))
    console.print(table)


def _conclusions(diagnosis: Diagnosis) -> list[str]:
    absent = {report.target: report.command for report in diagnosis.targets if report.state == "not installed"}
    for extra in EXTRAS:
        if extra not in TARGETS and any(one.version is None for one in of_extra(diagnosis.dependencies, extra)):
            absent[extra] = f"pip install 'alignkd[{extra}]'"
    lines = [f"not installed: {extra}; run: {command}" for extra, command in absent.items()]
    broken = diagnosis.first_broken
    if broken:
        return [*lines, f"first broken layer: {broken.layer} ({broken.problem}); run: {broken.command}"]
    return [*lines, "all that is installed works"]


def _as_json(diagnosis: Diagnosis) -> dict[str, object]:
    return {
        "ok": diagnosis.first_broken is None,
        "first_broken": asdict(diagnosis.first_broken) if diagnosis.first_broken else None,
        "host": asdict(diagnosis.host),
        "dependencies": [
            {**asdict(found.dependency), "found": found.version, "state": found.state}
            for found in diagnosis.dependencies
        ],
        "targets": [asdict(report) for report in diagnosis.targets],
    }


def main() -> None:
    """Entry point of alignkd-doctor."""
    config = tyro.cli(DoctorConfig, prog="alignkd-doctor")
    run_command(lambda: doctor(config))


if __name__ == "__main__":
    main()
