"""Work done -> a line now and then that says how much of it, and when it will be over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN = 5.0
SECONDS_BETWEEN_SIGNS = 15.0


class Meter:
    """Counts ``total`` units of one kind of work and tells of them at most every few seconds.

    Args:
        what: begins each line, e.g. "weights written".
        progress: takes a line.
        clock: seconds; for tests.
    """

    def __init__(
        self, what: str, total: int, progress: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._progress, self._clock = what, total, progress, clock
        self._done = 0
        self._start = self._told = clock()

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` more."""
        self._done += amount
        now = self._clock()
        if now - self._told >= SECONDS_BETWEEN and self._done < self._total:
            self._told = now
            left = (now - self._start) * (self._total - self._done) / self._done
            self._progress(f"{self._what}: {100 * self._done / self._total:.0f} %, about {duration(left)} left")


@contextmanager
def waiting(
    what: str,
    expected_seconds: float,
    progress: Callable[[str], None],
    every_seconds: float = SECONDS_BETWEEN_SIGNS,
) -> Iterator[None]:
    """Give a sign of life now and then while the block runs, of a library's call that tells nothing itself."""
    start, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(every_seconds):
            passed = time.monotonic() - start
            left = expected_seconds - passed
            rest = (
                f"about {duration(left)} left" if left > 0 else f"longer than the {duration(expected_seconds)} expected"
            )
            progress(f"{what}: {duration(passed)}, {rest}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
