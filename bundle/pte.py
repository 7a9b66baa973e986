"""A .pte file -> its program without the weights, and where in the file each constant lies; nothing else is read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bundle.errors import missing_extra

HEAD_BYTES = 64  # the extended header lies among them


@dataclass(frozen=True)
class Pte:
    """An opened .pte.

    Attributes:
        program: executorch.exir.schema.Program; its weights lie in segments of the file.
        segments_at: where the first segment begins.
    """

    path: Path
    program: Any
    segments_at: int

    def segment(self, index: int) -> tuple[int, int]:
        """First byte of a segment in the file, and the one behind its last."""
        start = self.segments_at + self.program.segments[index].offset
        return start, start + self.program.segments[index].size

    def constants(self) -> Iterator[tuple[str, int, int]]:
        """Key, first byte and end of every constant.

        Data of delegates have keys that ExecuTorch makes of their contents; constants of other operators have none, so
        they are named by their place in the shared segment, and may end in some bytes of padding.
        """
        for entry in self.program.named_data or ():
            yield entry.key, *self.segment(entry.segment_index)
        shared = self.program.constant_segment
        if shared is None or not shared.offsets:
            return
        start, end = self.segment(shared.segment_index)
        bounds = [start + offset for offset in shared.offsets] + [end]
        for index, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
            yield f"constant_segment.{index}", first, last

    def delegates(self) -> dict[str, tuple[str, ...]]:
        """Method -> the backends that compute a part of it, sorted; what none of them took runs on plain kernels."""
        return {plan.name: tuple(sorted({part.id for part in plan.delegates})) for plan in self.program.execution_plan}


def open_pte(path: Path) -> Pte:
    """Read the program of a .pte.

    Raises:
        UsageError: executorch, whose format it is, is not installed.
    """
    try:
        program_of = import_module("executorch.exir._serialize._flatbuffer_program")._flatbuffer_to_program
        header_of = import_module("executorch.exir._serialize._program")._get_extended_header
    except ModuleNotFoundError as error:
        raise missing_extra((error.name or "executorch").split(".")[0], "executorch") from error
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        header = header_of(whole[:HEAD_BYTES])
        return Pte(path, program_of(whole[: header.program_size]), header.segment_base_offset)
