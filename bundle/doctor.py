"""This host -> what is installed beside what was tested, which targets work here, and the first broken layer.

A target works when a process of its own imports it, exports a tiny random model and runs the graphs (export/smoke.py).
A missing extra is no fault; something installed that does not work is.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bundle.dependencies import Found, look_up, of_extra

TARGETS = ("onnx", "executorch", "coreml", "coreai")
LAYERS = ("import", "export", "run")
PYTHON = (3, 11)
LIMIT_S = 300  # a target takes 5 to 20 s on an idle machine

TargetState = Literal["works", "not installed", "broken"]


@dataclass(frozen=True)
class Host:
    """What the measurements would run on."""

    python: str
    platform: str
    cpu: str
    cores: int
    memory_bytes: int


@dataclass(frozen=True)
class Broken:
    """Something installed that does not work, and what mends it."""

    layer: str
    problem: str
    command: str


@dataclass(frozen=True)
class TargetReport:
    """What this host can do for a target.

    Attributes:
        layers_s: seconds of each layer that works, in order.
        runtime: engine and version that ran the graphs.
        covers: what a verdict from it covers.
        command: for a target that is not installed, what installs it.
    """

    target: str
    state: TargetState
    layers_s: dict[str, float]
    runtime: str = ""
    covers: str = ""
    broken: Broken | None = None
    command: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that alignkd-doctor says."""

    host: Host
    dependencies: tuple[Found, ...]
    targets: tuple[TargetReport, ...]
    first_broken: Broken | None


def diagnose(targets: tuple[str, ...] = TARGETS) -> Diagnosis:
    """Look at this host; each installed target is tried in a process of its own, all at once."""
    found = look_up()
    with ThreadPoolExecutor(len(targets)) as pool:
        reports = tuple(pool.map(lambda target: report_target(target, found), targets))
    broken = [*_broken_base(found), *(report.broken for report in reports if report.broken)]
    return Diagnosis(read_host(), found, reports, broken[0] if broken else None)


def read_host() -> Host:
    """Python, processor and memory of this machine."""
    return Host(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def report_target(target: str, found: tuple[Found, ...]) -> TargetReport:
    """Try one target, if its extra is installed."""
    missing = [one.dependency.package for one in of_extra(found, target) if one.version is None]
    if missing:
        return TargetReport(target, "not installed", {}, command=f"pip install 'alignkd[{target}]'")
    command = [sys.executable, "-P", "-m", "export.smoke", "--target", target]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        again = f"alignkd-doctor --target {target}  (on an idle machine)"
        return _judge(target, _text(error.stdout), f"took longer than {LIMIT_S} s", again)
    return _judge(target, done.stdout, _last_words(done), _mend(target, found))


def _judge(target: str, stdout: str, problem: str, command: str) -> TargetReport:
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith('{"layer"')]
    layers_s = {line["layer"]: line["seconds"] for line in lines}
    failed = [layer for layer in LAYERS if layer not in layers_s]
    if failed:
        return TargetReport(target, "broken", layers_s, broken=Broken(f"{target} {failed[0]}", problem, command))
    return TargetReport(target, "works", layers_s, lines[-1]["runtime"], lines[-1]["covers"])


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process that did not finish its layers ended."""
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"the process ended with code {done.returncode}"


def _mend(target: str, found: tuple[Found, ...]) -> str:
    """The tested versions of what differs; where nothing differs, a fresh copy of the target's packages."""
    concerned = (*of_extra(found, None), *of_extra(found, target))
    pins = [one.pin for one in concerned if one.state != "ok"]
    if pins:
        return f"pip install {' '.join(pins)}"
    return f"pip install --force-reinstall 'alignkd[{target}]'"


def _broken_base(found: tuple[Found, ...]) -> list[Broken]:
    if sys.version_info[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        problem = f"Python {platform.python_version()} runs, alignkd is made for {wanted}"
        return [Broken("python", problem, f"python{wanted} -m venv .venv && .venv/bin/pip install alignkd")]
    missing = [one for one in of_extra(found, None) if one.version is None]
    if missing:
        names = ", ".join(one.dependency.package for one in missing)
        return [Broken("base", f"not installed: {names}", f"pip install {' '.join(one.pin for one in missing)}")]
    return []


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
