"""This host -> the processor family whose kernels run here, by which the verifier looks its tolerances up."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

from bundle.manifest import Family

CPUINFO = Path("/proc/cpuinfo")
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
# One name a feature and system: Linux prints HWCAPs, macOS answers sysctl.
ARM_FEATURES: dict[str, tuple[str, str]] = {
    "i8mm": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
}


def family_of(machine: str, system: str, flags: frozenset[str]) -> Family:
    """Processor features -> family; what is not known to have an instruction is taken not to have it.

    Args:
        machine: as platform.machine() says.
        system: as platform.system() says.
        flags: feature names of /proc/cpuinfo, or the names of the sysctl switches that are on.
    """
    if machine.lower() in ("arm64", "aarch64"):
        column = 1 if system == "Darwin" else 0
        if ARM_FEATURES["i8mm"][column] in flags:
            return "arm64-i8mm"
        return "arm64-dotprod" if ARM_FEATURES["dotprod"][column] in flags else "arm64"
    return "x86_64-vnni" if flags & VNNI_FLAGS else "x86_64-avx2"


def host_family() -> Family:
    """The family of this host's CPU."""
    system = platform.system()
    return family_of(platform.machine(), system, READERS.get(system, frozenset)())


def _linux_flags() -> frozenset[str]:
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _darwin_flags() -> frozenset[str]:
    names = [darwin for _, darwin in ARM_FEATURES.values()]
    asked = subprocess.run(["sysctl", *names], capture_output=True, text=True, timeout=10)
    answers = (line.partition(":") for line in asked.stdout.splitlines())
    return frozenset(name for name, _, value in answers if value.strip() == "1")


READERS: dict[str, Callable[[], frozenset[str]]] = {"Linux": _linux_flags, "Darwin": _darwin_flags}
