"""Progress lines: how much is done and when it will be over."""

from __future__ import annotations

import threading
import time

import pytest

from export.job.meter import Meter, duration, waiting


def test_lines_come_every_few_seconds_and_know_what_is_left() -> None:
    lines: list[str] = []
    now = [0.0]
    meter = Meter("weights written", 100, lines.append, clock=lambda: now[0])
    for now[0], amount in ((1.0, 5), (6.0, 20), (7.0, 5), (12.0, 20), (24.0, 50)):
        meter.advance(amount)
    assert lines == ["weights written: 25 %, about 18 s left", "weights written: 50 %, about 12 s left"]


def test_signs_of_life_end_with_the_work() -> None:
    lines: list[str] = []
    enough = threading.Event()

    def progress(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            enough.set()

    with pytest.raises(ValueError), waiting("lowering", 100.0, progress, every_seconds=0.01):
        assert enough.wait(5)
        raise ValueError
    told = len(lines)
    assert lines[0].startswith("lowering: 0 s, about 1 min ") and lines[0].endswith(" left")
    time.sleep(0.05)
    assert len(lines) == told
    with waiting("lowering", 0.0, lines.append, every_seconds=0.01):
        time.sleep(0.05)
    assert lines[-1] == "lowering: 0 s, longer than the 0 s expected"


@pytest.mark.parametrize("seconds,said", [(0.4, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
