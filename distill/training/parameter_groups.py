"""AlignKD + settings -> optimizer groups: every trainable parameter in exactly one of decoder, projector, adapters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from distill.align_kd.module import AlignKD
from distill.settings.training import DistillConfig

STUDENT, PROJECTOR = "student.", "student.projector."


def group_of(name: str) -> str:
    """The group of a parameter of AlignKD by its name."""
    if not name.startswith(STUDENT):
        return "adapters"
    return "projector" if name.startswith(PROJECTOR) else "decoder"


def learning_rates(config: DistillConfig) -> dict[str, float]:
    """Group -> learning rate, in the order of the optimizer's groups."""
    return {
        "decoder": config.learning_rate,
        "projector": config.projector_learning_rate or config.learning_rate,
        "adapters": config.adapter_learning_rate,
    }


def parameter_groups(module: AlignKD, config: DistillConfig) -> list[dict[str, Any]]:
    """Groups for torch.optim; a group without parameters is left out."""
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name)].append(parameter)
    return [
        {"name": name, "params": groups[name], "lr": rate, "weight_decay": config.weight_decay}
        for name, rate in learning_rates(config).items()
        if groups[name]
    ]
