"""Name of a tracker + settings -> Trainer callbacks that send it every log entry; a missing package is one line."""

from __future__ import annotations

import importlib.util
import os

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from bundle.errors import missing_extra
from distill.config import DistillConfig


def trackers(config: DistillConfig) -> list[TrainerCallback]:
    """The callbacks of ``--report``; only the main process asks for them.

    Raises:
        UsageError: the tracker's package is not installed.
    """
    if config.report == "none":
        return []
    if importlib.util.find_spec(config.report) is None:
        raise missing_extra(config.report, "distill" if config.report == "tensorboard" else config.report)
    if config.report == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(config.work / "tensorboard")))]
    if config.report == "wandb":
        os.environ.setdefault("WANDB_DIR", str(config.work))  # nothing is written into the current folder
        return [WandbCallback()]
    return [TrackioCallback()]
