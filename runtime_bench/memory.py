"""This process -> its peak and resident memory in bytes, from /proc where there is one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
KIB = 1024


@dataclass(frozen=True)
class Resident:
    """Memory of one process, in bytes; None where the operating system does not say."""

    peak_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None


def read_memory() -> Resident:
    """Memory of this process now; the peak is since it started."""
    if STATUS.is_file():
        return parse_status(STATUS.read_text(encoding="ascii", errors="replace"))
    import resource

    unit = 1 if sys.platform == "darwin" else KIB  # getrusage counts bytes on macOS, KiB elsewhere
    return Resident(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None, None)


def parse_status(text: str) -> Resident:
    """The text of /proc/PID/status -> VmHWM, RssAnon and RssFile."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def kib(name: str) -> int | None:
        value = fields.get(name)
        return None if value is None else int(value.split()[0]) * KIB

    peak = kib("VmHWM")
    assert peak is not None, "a Linux process status has VmHWM"
    return Resident(peak, kib("RssAnon"), kib("RssFile"))
