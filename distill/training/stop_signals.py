"""Ctrl-C or SIGTERM -> the step is finished, a checkpoint written, and the run ends with one line and its exit code."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bundle.errors import AlignKDError
from distill.training.ranks import Ranks

WATCHED = (signal.SIGINT, signal.SIGTERM)


class Stopped(AlignKDError):
    """The run was asked to end before its last step."""

    def __init__(self, line: str, number: int = signal.SIGTERM) -> None:
        super().__init__(line)
        self.exit_code = 128 + number


class StopSignals(TrainerCallback):
    """Within ``with``, the first signal asks for a clean end; a second Ctrl-C breaks off at once."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._received: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    @property
    def received(self) -> int | None:
        """The signal that ended the run."""
        return self._received

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asked in one process, all of them save this step and stop."""
        if self._ranks.any(self._received is not None):
            self._received = self._received or signal.SIGTERM
            control.should_save = state.global_step < state.max_steps
            control.should_training_stop = True
