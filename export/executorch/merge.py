"""Several .pte files with a method each -> one .pte with all methods, as ExecuTorch's multimodal runner wants it.

Each graph is lowered by itself, so that one graph at a time is in memory and an export that is killed does not lower
the others again. Joining copies the weights from file to file; only the programs, some hundred KB, are taken apart.
The format is executorch/exir/_serialize/program.fbs, written by ExecuTorch's own functions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from bundle.pte import Pte, open_pte

ALIGNMENT = 128  # of segments, and of each part's constants inside theirs: what ExecuTorch writes, or more
COPY_BYTES = 1 << 24


@dataclass
class Whole:
    """The program under construction, and where the bytes of its segments come from."""

    program: Any
    segments: list[list[tuple[Path, int, int]]] = field(default_factory=list)  # pieces: file, first byte, end
    offsets: list[int] = field(default_factory=lambda: [0])  # of constants; the first stands for "none"
    constants: list[tuple[Path, int, int]] = field(default_factory=list)
    constant_bytes: int = 0

    def add(self, path: Path, start: int, end: int) -> int:
        """A segment more -> its index."""
        self.segments.append([(path, start, end)])
        return len(self.segments) - 1


def merge(parts: Sequence[Path], output: Path) -> None:
    """Write the methods of all ``parts`` into ``output``, built aside and renamed."""
    from executorch.exir.schema import Program, SubsegmentOffsets

    first = open_pte(parts[0])
    empty = SubsegmentOffsets(segment_index=0, offsets=[])
    whole = Whole(Program(first.program.version, [], [], [], [], empty, None, []))
    for path in parts:
        _take(whole, open_pte(path))
    if whole.constants:
        whole.segments.append(whole.constants)
        whole.program.constant_segment = SubsegmentOffsets(len(whole.segments) - 1, whole.offsets)
    aside = output.with_name(f"{output.name}.part")
    _write(whole, aside)
    os.replace(aside, output)


def _take(whole: Whole, part: Pte) -> None:
    """Append a part's methods, their indices moved to where its data come to lie."""
    assert not part.program.constant_buffer and not part.program.mutable_data_segments, "no segment of their own"
    shift = _take_constants(whole, part)
    delegates: dict[int, int] = {}  # segment of the part -> of the whole
    inline = len(whole.program.backend_delegate_data)
    whole.program.backend_delegate_data += part.program.backend_delegate_data
    for plan in part.program.execution_plan:
        for delegate in plan.delegates:
            place = delegate.processed
            if place.location.name == "INLINE":
                place.index += inline
            else:
                if place.index not in delegates:
                    delegates[place.index] = whole.add(part.path, *part.segment(place.index))
                place.index = delegates[place.index]
        for value in plan.values:
            if type(value.val).__name__ == "Tensor" and value.val.data_buffer_idx > 0:
                value.val.data_buffer_idx += shift
        whole.program.execution_plan.append(plan)
    known = {entry.key for entry in whole.program.named_data}
    for entry in part.program.named_data or ():
        if entry.key not in known:  # a key is a digest of what it names
            entry.segment_index = whole.add(part.path, *part.segment(entry.segment_index))
            whole.program.named_data.append(entry)


def _take_constants(whole: Whole, part: Pte) -> int:
    """Append a part's constants -> by how much its buffer indices grow."""
    shared, shift = part.program.constant_segment, len(whole.offsets) - 1
    if shared is None or len(shared.offsets) < 2:
        return shift
    start, end = part.segment(shared.segment_index)
    at = _aligned(whole.constant_bytes)
    whole.offsets += [at + offset for offset in shared.offsets[1:]]
    whole.constants.append((part.path, start, end))
    whole.constant_bytes = at + end - start
    return shift


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write(whole: Whole, path: Path) -> None:
    from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
    from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
    from executorch.exir.schema import DataSegment
    from executorch.exir.tensor import ALIGNMENT as TENSOR_ALIGNMENT

    end = 0
    for pieces in whole.segments:
        start = end = _aligned(end)
        for _, first, last in pieces:
            end = _aligned(end) + last - first
        whole.program.segments.append(DataSegment(offset=start, size=end - start))
    packed = _program_to_flatbuffer(whole.program, constant_tensor_alignment=TENSOR_ALIGNMENT, delegate_alignment=None)
    header_bytes = -(-_ExtendedHeader.EXPECTED_LENGTH // packed.max_alignment) * packed.max_alignment
    program_bytes = header_bytes + len(packed.data)
    header = _ExtendedHeader(program_bytes, _aligned(program_bytes), end).to_bytes().ljust(header_bytes, b"\0")
    with path.open("wb") as out:
        out.write(_insert_flatbuffer_header(packed.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", header))
        for pieces in whole.segments:
            for source, first, last in pieces:
                out.write(bytes(_aligned(out.tell()) - out.tell()))  # the first segment begins at a multiple as well
                _copy(source, first, last, out)


def _copy(source: Path, first: int, last: int, out: BinaryIO) -> None:
    with source.open("rb") as file:
        file.seek(first)
        for at in range(first, last, COPY_BYTES):
            out.write(file.read(min(COPY_BYTES, last - at)))
