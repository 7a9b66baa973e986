"""A number of threads -> numpy's matrix products inside a ``with`` block use that many."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

# exported by the OpenBLAS that numpy's wheels carry; on a Mac numpy uses Accelerate, which looks after itself
GET, SET = "scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"


@cache
def openblas() -> ctypes.CDLL | None:
    """The library that numpy computes with, or None where its wheel carries none."""
    libraries = sorted((Path(np.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64_*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None  # numpy has loaded it: the same handle


@contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """Limit numpy's BLAS to ``count`` threads, then give it back what it had; None changes nothing."""
    library = openblas()
    if library is None or count is None:
        yield
        return
    before = int(library[GET]())
    library[SET](count)
    try:
        yield
    finally:
        library[SET](before)
