"""A number of rows -> time and peak memory of opening them, of an epoch's order and of the doctor, a process each.

Writes small LLaVA rows without images (``--format list`` or ``lines``), then runs every stage in a process of its own
and reads that process's peak resident memory. ``start`` is a process that imports the same modules and opens nothing:
what a stage adds to it is what the rows cost. ``json.load`` is shown for comparison. Example:

    python benchmarks/data_scale.py --rows 2000000 --json data_scale.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from bundle.staging import write_text_whole

WORDS = "the a red blue green dog cat circle square on under beside large small what where how many".split()
MIB = 1 << 20
SAMPLED_ROWS = 20_000


def rows(number: int, seed: int) -> Iterator[str]:
    """LLaVA rows as JSON, 20 to 120 words each."""
    draws = random.Random(seed)
    for i in range(number):
        question, answer = (" ".join(draws.choices(WORDS, k=draws.randint(10, 60))) for _ in range(2))
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield json.dumps({"id": str(i), "conversations": talk})


def write(path: Path, number: int, lines: bool) -> None:
    """All rows, one at a time."""
    before, between, after = ("", "\n", "\n") if lines else ("[", ",\n", "]\n")
    with path.open("w") as file:
        file.write(before)
        for i, row in enumerate(rows(number, 0)):
            file.write(between if i else "")
            file.write(row)
        file.write(after)


def start(data: Path, index: Path) -> None:
    """Only the imports."""
    import distill.batches.collator
    import distill.data_doctor.doctor  # noqa: F401


def build(data: Path, index: Path) -> None:
    """First opening: the index is built."""
    start(data, index)
    from distill.data.rows import read_rows

    read_rows(data, None, index)


def reopen(data: Path, index: Path) -> None:
    """Opening with the index there, and reading some rows in a random order."""
    start(data, index)
    from distill.data.rows import read_rows

    opened = read_rows(data, None, index)
    draws = random.Random(1)
    for _ in range(SAMPLED_ROWS):
        opened[draws.randrange(len(opened))]


def order(data: Path, index: Path) -> None:
    """Lengths of all rows and the order of an epoch for 16 processes of 8 rows, walked to its end."""
    start(data, index)
    import numpy as np

    from distill.batches.batch_order import LengthGroupedOrder
    from distill.data.rows import read_rows

    opened = read_rows(data, None, index)
    for _ in LengthGroupedOrder(opened.characters.astype(np.int64), 8, 0, 16):
        pass


def check(data: Path, index: Path) -> None:
    """alignkd-data check in one process."""
    start(data, index)
    from distill.data_doctor.doctor import ImageRule, check_data
    from distill.data_doctor.row_check import LengthRule

    report = check_data(data, None, LengthRule(2048, 144), ImageRule(workers=1))
    assert not report.faults


def load_all(data: Path, index: Path) -> None:
    """What the index replaces: the whole list in memory."""
    start(data, index)
    text = data.read_text()
    [json.loads(line) for line in text.splitlines()] if text.startswith("{") else json.loads(text)


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "start": start,
    "build index": build,
    f"reopen, read {SAMPLED_ROWS} rows": reopen,
    "order of an epoch": order,
    "check": check,
    "json.load": load_all,
}


def measured(stage: Callable[[Path, Path], None], data: Path, index: Path) -> dict[str, float]:
    """Seconds and peak MiB of a stage in a new process."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(stage, data, index, sending))
    process.start()
    sending.close()
    try:
        seconds, peak = receiving.recv()
    except EOFError:
        raise SystemExit(f"the stage {stage.__name__} died; its error is above") from None
    process.join()
    return {"seconds": round(seconds, 2), "peak_mib": round(peak / MIB, 1)}


def _run(stage: Callable[[Path, Path], None], data: Path, index: Path, sending: Connection) -> None:
    begun = time.monotonic()
    stage(data, index)
    seconds = time.monotonic() - begun
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    sending.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))


def main() -> None:
    """Write, run every stage, print a table and keep the numbers if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--format", choices=["list", "lines"], default="list")
    parser.add_argument("--folder", type=Path, help="where the data are written for the time of the run; default: /tmp")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data, index = Path(folder) / "rows.json", Path(folder) / "index"
        write(data, options.rows, options.format == "lines")
        found = {name: measured(STAGES[name], data, index) for name in options.stages}
        size = data.stat().st_size
        index_size = sum(path.stat().st_size for path in index.iterdir()) if index.is_dir() else 0
    facts = {"rows": options.rows, "format": options.format, "data_mib": size // MIB, "index_mib": index_size // MIB}
    machine = {"machine": platform.machine(), "python": platform.python_version(), "cpus": os.cpu_count()}
    sys.stdout.write(f"{facts | machine}\n| stage | seconds | peak MiB |\n|---|---:|---:|\n")
    for name, one in found.items():
        sys.stdout.write(f"| {name} | {one['seconds']} | {one['peak_mib']} |\n")
    if options.json:
        write_text_whole(options.json, json.dumps(facts | machine | {"stages": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
