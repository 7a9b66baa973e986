"""Safe files: outputs are built aside and renamed when whole; names from outside cannot leave their folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle.errors import UsageError


@contextmanager
def fresh_directory(output: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``output``; rename it to ``output`` on success, delete it on any failure.

    Raises:
        UsageError: ``output`` exists already, or its parent cannot be written.
    """
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    aside.chmod(0o755)
    try:
        yield aside
        refuse_existing(output)
        os.rename(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def refuse_existing(output: Path) -> None:
    """Raise UsageError when ``output`` exists, so that nothing is ever overwritten."""
    if output.exists():
        raise UsageError(f"output {output} exists already; choose another --output or remove it first")


def write_text_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a temporary sibling, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def inside(root: Path, name: str, what: str = "file name") -> Path:
    """Resolve ``name`` under ``root``, refusing absolute names, ``..`` and links that leave it.

    Raises:
        UsageError: the name points outside ``root``.
    """
    candidate = (root / name).resolve()
    if not name or "\\" in name or Path(name).is_absolute() or not candidate.is_relative_to(root.resolve()):
        raise UsageError(f"{what} '{name}' leaves its folder {root}; names must be relative and stay inside")
    return candidate


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
