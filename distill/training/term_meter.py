"""Terms of every micro batch -> means per log entry over all processes, and each term's own gradient norm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from bundle.staging import write_text_whole
from distill.align_kd.module import AlignKD

LOSS = "loss"  # name of the weighted sum beside the terms
METER_FILE = "term_meter.json"  # of a checkpoint: what was summed since the last log entry


class TermMeter:
    """Sums of the terms since the last log entry; they travel with a checkpoint, so that a resumed log is the same."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._norms: dict[str, float] = {}

    def add(self, shares: Mapping[str, torch.Tensor]) -> None:
        """A micro batch's share of each term and of the loss of this step; those of all processes add up to them."""
        for name, share in shares.items():
            value = share.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def step_ended(self) -> None:
        self._steps += 1

    def measured(self, norms: dict[str, float]) -> None:
        """Gradient norms, shown with the next log entry."""
        self._norms = norms

    def take(self) -> dict[str, float]:
        """Means since the last call as a log entry; every process must call it."""
        steps = max(1, self._steps)
        means = {name: value / steps for name, value in self._reduced().items()}
        entry = {name if name == LOSS else f"term/{name}": value for name, value in means.items()}
        entry |= {f"gradient_norm/{name}": norm for name, norm in self._norms.items()}
        self._sums, self._steps, self._norms = {}, 0, {}
        return entry

    def save(self, folder: Path, main: bool) -> None:
        """Write into a checkpoint; every process must call it, the main one writes."""
        sums = self._reduced()
        if main:
            state = {"sums": sums, "steps": self._steps, "norms": self._norms}
            write_text_whole(folder / METER_FILE, json.dumps(state) + "\n")

    def load(self, folder: Path, device: torch.device, main: bool) -> None:
        """Go on from a checkpoint; the main process holds what all had summed."""
        state = json.loads((folder / METER_FILE).read_text(encoding="utf-8"))
        share = 1.0 if main else 0.0
        self._sums = {
            name: torch.tensor(value * share, dtype=torch.float64, device=device)
            for name, value in state["sums"].items()
        }
        self._steps, self._norms = state["steps"], state["norms"]

    def _reduced(self) -> dict[str, float]:
        if not self._sums:
            return {}
        stacked = torch.stack(list(self._sums.values()))
        if self._ranks > 1:
            dist.all_reduce(stacked)
        return dict(zip(self._sums, stacked.tolist(), strict=True))


def gradient_norms(module: AlignKD, terms: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Norm of each weighted term's own gradient into the student; an inert term shows as 0."""
    parameters = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
    norms = {}
    for name, value in terms.items():
        if not value.requires_grad:  # the published code's attention term is a constant
            norms[name] = 0.0
            continue
        weighted = module.weights[name] * value
        found = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.detach().float().square().sum() for gradient in found if gradient is not None]
        norms[name] = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    return norms
