"""The processes that accelerate or torchrun started -> who writes, who waits, and one line when any of them fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from rich.console import Console
from torch.distributed.distributed_c10d import _get_default_store

from bundle.errors import AlignKDError

FAILED = "alignkd/failed"  # key of the group's store, counts the processes that failed
Value = TypeVar("Value")


class Ranks:
    """This process among those of the run; a run of one process is the same without any waiting."""

    def __init__(self, state: PartialState) -> None:
        self.index, self.count = state.process_index, state.num_processes
        self.main = self.index == 0
        if self.count > 1 and state.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # accelerate 1.15 shards on accelerators only; torch's fully_shard runs over gloo, so that a run can be
            # rehearsed without a GPU
            state.distributed_type = DistributedType.MULTI_GPU

    def console(self, wanted: Console | None) -> Console:
        """The console of the main process; silent elsewhere."""
        if self.main:
            return wanted or Console(stderr=True)
        return Console(stderr=True, quiet=True)

    def told(self, value: Value) -> Value:
        """The main process's ``value``, in every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every process's ``value``, in the order of the processes; all of them must ask."""
        if self.count == 1:
            return [value]
        found: list[Value | None] = [None] * self.count
        dist.all_gather_object(found, value)
        return cast(list[Value], found)

    def sent(self, values: torch.Tensor, source: int, device: torch.device) -> torch.Tensor:
        """The ``values`` of process ``source``, in every process, on the CPU.

        Args:
            values: the others' are of the same shape and dtype, and are not looked at.
            device: that the processes talk through.
        """
        there = values.to(device)
        dist.broadcast(there, src=source)
        return there.cpu()

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in one of the processes; all of them must ask."""
        if self.count == 1:
            return flag
        found = torch.tensor([float(flag)], device=PartialState().device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A part of the run outside the training loop: when it fails in one process, it fails in all of them.

        The main process raises the error of the first that failed, the others leave quietly with the same exit code.
        """
        error: AlignKDError | None = None
        try:
            yield
        except AlignKDError as raised:
            error = raised
        if self.count == 1:
            if error is not None:
                raise error
            return
        found: list[tuple[type[AlignKDError], str] | None] = [None] * self.count
        dist.all_gather_object(found, None if error is None else (type(error), str(error)))
        first = next((one for one in found if one is not None), None)
        if first is not None:
            kind, line = first
            raise kind(line) if self.main else SystemExit(kind.exit_code)

    @contextmanager
    def first_failure_only(self) -> Iterator[None]:
        """The training loop, where the others wait in a collective: who fails first says so, the others go quietly."""
        try:
            yield
        except BaseException as error:
            if self.count == 1 or isinstance(error, SystemExit):
                raise
            try:
                failures = int(_get_default_store().add(FAILED, 1))
            except dist.DistNetworkError:  # the store went down with the process that held it, which said why
                failures = self.count
            if failures > 1:
                raise SystemExit(1) from error
            if isinstance(error, AlignKDError):
                raise type(error)(f"process {self.index} of {self.count}: {error}") from error
            raise
