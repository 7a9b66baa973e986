"""Files -> their pages dropped from the operating system's cache, and whether that really happened."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

STILL_CACHED = 0.05  # share of pages that may stay (others map the file, or the file system keeps its first pages)


def drop_pages(folder: Path) -> bool:
    """Ask the kernel to forget every file under ``folder``; True when it then holds next to nothing of them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size > 0]
    if not files or sys.platform != "linux":  # macOS and Windows have no such call
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages are dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    pages = [cached_pages(path) for path in files]
    return sum(cached for cached, _ in pages) <= STILL_CACHED * sum(total for _, total in pages)


def cached_pages(path: Path) -> tuple[int, int]:
    """Pages of a file that are in memory, and all its pages (mincore)."""
    total = -(-path.stat().st_size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        flags = (ctypes.c_ubyte * total)()
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), ctypes.byref(flags)
        )
        del start  # the view cannot be closed while a pointer into it lives
    return (total if failed else sum(flag & 1 for flag in flags)), total
