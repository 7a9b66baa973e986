"""One training step -> its seconds, its peak memory above what was there, its floating-point operations."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from runtime_bench.memory import read_memory

Step = Callable[[], torch.Tensor]
# Dense TFLOP/s by NVIDIA's data sheets (without sparsity): part of the card's name -> (bfloat16 tensor cores, float32).
# The first that fits counts.
PEAKS = {
    "H100 PCIe": (756.0, 51.0),  # H100 data sheet, PCIe column
    "H100 NVL": (835.0, 60.0),  # H100 data sheet, NVL column
    "H100": (989.0, 67.0),  # H100 data sheet, SXM column
    "H200": (989.0, 67.0),  # H200 data sheet, SXM column
    "A100": (312.0, 19.5),  # A100 data sheet
    "L40S": (362.0, 91.6),  # L40S data sheet
    "L4": (121.0, 30.3),  # L4 data sheet
    "A10": (125.0, 31.2),  # A10 data sheet
    "RTX 4090": (165.2, 82.6),  # Ada whitepaper, appendix A; bfloat16 with float32 accumulation
}


def seconds_of(step: Step, device: str, processor_time: bool) -> float:
    """Forward, losses and backward. ``processor_time``: this process's own, blind to what others do; for one thread."""
    clock = time.process_time if processor_time else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    step().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def peak_bytes(step: Step, device: str, held: Sequence[nn.Parameter] = ()) -> int:
    """Peak bytes during one step above those before it.

    Args:
        held: parameters whose gradients are there before the step and so do not count; without, all gradients do.
    """
    if device == "cuda":
        _hold(held)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_peak_in_child, args=(theirs, step, held))
    child.start()
    theirs.close()
    peak = int(ours.recv())
    child.join()
    return peak


def operations(step: Step) -> int:
    """Floating-point operations of the step's matrix products and attention, backward included; recomputed ones too."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return int(counter.get_total_flops())


def peak_rate(card: str, autocast: bool) -> float | None:
    """FLOP/s that the card could do at best in the arithmetic used; None for a card that is not in the table."""
    for name, (low, full) in PEAKS.items():
        if name.lower() in card.lower():
            return (low if autocast else full) * 1e12
    return None


def _peak_in_child(pipe: Connection, step: Step, held: Sequence[nn.Parameter]) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive a fork
    _hold(held)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now what is resident
    before = read_memory().peak_bytes
    step().backward()
    pipe.send(read_memory().peak_bytes - before)
    pipe.close()
    os._exit(0)


def _hold(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter).add_(0)  # written to, so that it is resident
