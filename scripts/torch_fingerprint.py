"""The installed torch -> JSON on stdout: version and the hash of its file list, to notice a later replacement."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import distribution


def fingerprint() -> dict[str, str]:
    """Version and SHA-256 of torch's RECORD, which lists the hash of every file that its wheel installed."""
    torch = distribution("torch")
    record = torch.read_text("RECORD") or ""
    installed = sorted(line for line in record.splitlines() if "__pycache__" not in line)
    return {"version": torch.version, "record_sha256": hashlib.sha256("\n".join(installed).encode()).hexdigest()}


if __name__ == "__main__":
    json.dump(fingerprint(), sys.stdout)
