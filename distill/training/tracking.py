"""Name of a tracker + settings -> Trainer callbacks that send it every log entry; a missing package is one line."""

from __future__ import annotations

import importlib.util
import os

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from bundle.errors import UsageError
from distill.settings.training import DistillConfig
from distill.training.arguments import PROJECT


def trackers(config: DistillConfig) -> list[TrainerCallback]:
    """The callbacks of ``--report``; only the main process asks for them.

    Raises:
        UsageError: the tracker's package is not installed.
    """
    if config.report == "none":
        return []
    if importlib.util.find_spec(config.report) is None:
        raise UsageError(
            f"--report {config.report} needs the package '{config.report}'; run: pip install {config.report}"
        )
    if config.report == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(config.work / "tensorboard")))]
    if config.report == "wandb":
        # its files lie beside the run's, and outlive the work folder
        os.environ.setdefault("WANDB_DIR", str(config.output.parent))
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        return [WandbCallback()]
    return [TrackioCallback()]
