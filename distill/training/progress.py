"""Trainer events -> progress on stderr: a bar on a terminal, about twenty lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINES = 20


class ProgressLine(TrainerCallback):
    """Shows step, loss terms and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._shown = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self._shown = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        terms = " ".join(
            f"{name.removeprefix('term/')} {value:.3g}" for name, value in logs.items() if name.startswith("term/")
        )
        if not terms:
            return
        if left_out := int(logs.get("rows_left_out", 0)):
            terms += f" rows left out {left_out}"
        self._bar.update(self._task, description=terms)
        if not self._console.is_terminal and state.global_step - self._shown >= state.max_steps / LINES:
            self._shown = state.global_step
            self._console.print(f"step {state.global_step}/{state.max_steps}: {terms}", soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.stop()
