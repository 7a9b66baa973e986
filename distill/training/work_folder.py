"""OUTPUT.work, where an unfinished run lies: may this run begin, may it continue, and from which checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bundle.errors import UsageError
from bundle.staging import refuse_existing
from distill.settings.training import DistillConfig
from distill.training.stop_signals import Stopped

SETTINGS_FILE = "settings.json"  # of an unfinished run, so that it is resumed only as it began
NOT_COMPARED = (
    "resume", "output", "log_steps", "save_steps", "cache_mb", "workers", "report", "on_bad_image", "eval_data",
    "eval_steps", "eval_rows", "gradient_checkpointing", "teacher_placement",
)  # fmt: skip
ROW_INDEX = "rows"  # where the data's rows lie


def check_output(config: DistillConfig) -> None:
    """Refuse what would overwrite a result, lose an unfinished run, or continue it with other settings.

    Raises:
        UsageError: the output exists; an unfinished run lies there and --resume is not given; or there is none to
            resume.
    """
    refuse_existing(config.output)
    if not config.resume:
        if config.work.exists():
            raise UsageError(f"an unfinished run lies in {config.work}; add --resume to continue it, or remove it")
        return
    if not config.work.is_dir():
        raise UsageError(f"nothing to resume: {config.work} does not exist; run the same command without --resume")
    if last_checkpoint(config.work) is None:
        return  # killed before its first checkpoint: begins again
    before = json.loads((config.work / SETTINGS_FILE).read_text(encoding="utf-8"))
    changed = {name: now for name, now in settings_of(config).items() if before.get(name) != now}
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now}" for name, now in changed.items())
        raise UsageError(f"--resume needs the settings that {config.work} began with: {listed}")


@contextmanager
def kept_if_resumable(work: Path, console: Console, main: bool = True) -> Iterator[None]:
    """When the run inside breaks off, keep ``work`` if it holds a checkpoint and leave nothing otherwise."""
    try:
        yield
    except BaseException as error:
        if not main:
            raise
        if last_checkpoint(work) is None:
            shutil.rmtree(work, ignore_errors=True)
        elif not isinstance(error, Stopped):  # which says so itself
            console.print(f"broken off; its last checkpoint is kept in {work}: continue with --resume", soft_wrap=True)
        raise


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint of an unfinished run that was written to its end; the Trainer writes its state last."""
    whole = [state.parent for state in work.glob("checkpoint-*/trainer_state.json") if _is_json(state)]
    return str(max(whole, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))) if whole else None


def step_of(checkpoint: str | None) -> int:
    """The optimizer step that a checkpoint was written at; 0 for none."""
    return 0 if checkpoint is None else int(Path(checkpoint).name.removeprefix("checkpoint-"))


def _is_json(path: Path) -> bool:
    """False for a file whose writing was cut short."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True


def settings_of(config: DistillConfig) -> dict[str, Any]:
    """The settings that decide the result, as JSON values."""
    return {name: value for name, value in every_setting(config).items() if name not in NOT_COMPARED}


def every_setting(config: DistillConfig) -> dict[str, Any]:
    """All settings as JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain
