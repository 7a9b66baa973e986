"""Words or settings -> the product run inside the test: to its exit code, or broken off at a step."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from distill import data_cli
from distill.settings.training import DistillConfig
from distill.training.progress import ProgressLine
from distill.training.run import train


def data_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of ``alignkd-data`` with these words."""
    monkeypatch.setattr(sys, "argv", ["alignkd-data", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        data_cli.main()
    return int(stopped.value.code or 0)


def break_off(config: DistillConfig, at: int) -> None:
    """Train until a step has been made, as if Ctrl-C came there at once."""

    def stop(self: ProgressLine, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressLine, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
