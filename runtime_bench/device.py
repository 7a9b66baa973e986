"""This machine and this source tree -> the parts of a row that say where a number was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

from runtime_bench.result import Device

ROOT = Path(__file__).parents[1]
CPUINFO = Path("/proc/cpuinfo")
OS_RELEASE_KEYS = ("PRETTY_NAME", "NAME")


def local_device() -> Device:
    """Describe the machine that this process runs on."""
    return Device(
        name="this host",
        cpu=_cpu_model(),
        architecture=platform.machine(),
        cores=_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        os=_os_name(),
        python=platform.python_version(),
    )


def source_commit() -> str | None:
    """Commit of the source tree that this package runs from, with -dirty after local changes; None when installed."""
    if not (ROOT / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "hardware"):
                return value.strip()
    return platform.processor() or platform.machine()


def _os_name() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return kernel
    name = next((release[key] for key in OS_RELEASE_KEYS if release.get(key)), "")
    return f"{name}, {kernel}" if name else kernel
