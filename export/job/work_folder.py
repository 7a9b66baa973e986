"""OUTPUT.work, where a bundle is built: renamed to OUTPUT when whole; finished graphs outlive a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from bundle.manifest import FileRecord, GraphName
from bundle.staging import inside, refuse_existing, sha256_of, write_text_whole

JOB_FILE, LOCK_FILE, BUNDLE_FOLDER, NOTES_FOLDER = "job.json", "lock", "bundle", "finished"


@dataclass(frozen=True)
class WorkFolder:
    """A bundle under construction.

    Attributes:
        bundle: the directory that becomes the bundle.
        notes: a JSON file for each graph that is whole: its files' sha256 and whatever its exporter needs to go on.
    """

    bundle: Path
    notes: Path

    def finished(self, graph: GraphName) -> dict[str, Any] | None:
        """What ``finish`` was given, if the graph was finished and its files are still what they were."""
        note = self.notes / f"{graph}.json"
        if not note.is_file():
            return None
        content = json.loads(note.read_text(encoding="utf-8"))
        records = {name: FileRecord.model_validate(record) for name, record in content["files"].items()}
        whole = all(_is(inside(self.bundle, name), record) for name, record in records.items())
        return content["note"] if whole else None

    def finish(self, graph: GraphName, files: Sequence[Path], note: Mapping[str, Any]) -> None:
        """Remember that a graph is whole."""
        records = {path.relative_to(self.bundle).as_posix(): _record(path).model_dump() for path in files}
        write_text_whole(self.notes / f"{graph}.json", json.dumps({"files": records, "note": dict(note)}))

    @property
    def kept_files(self) -> set[Path]:
        """Files of the bundle that belong to finished graphs."""
        notes = [json.loads(note.read_text(encoding="utf-8")) for note in self.notes.glob("*.json")]
        return {inside(self.bundle, name) for note in notes for name in note["files"]}


@contextmanager
def work_folder(output: Path, job: Mapping[str, Any], progress: Callable[[str], None]) -> Iterator[WorkFolder]:
    """Yield OUTPUT.work, continued if ``job`` broke off there before; rename its bundle to ``output`` on success.

    An error leaves nothing. What stops the process from outside (a kill, Ctrl-C, a power cut) leaves the folder.

    Raises:
        UsageError: ``output`` exists, another process is at it, or OUTPUT.work is of another job.
    """
    refuse_existing(output)
    work = output.with_name(f"{output.name}.work")
    folder = WorkFolder(work / BUNDLE_FOLDER, work / NOTES_FOLDER)
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_FILE).open("a") as lock:
        _lock(lock.fileno(), work, output)
        _check_job(work / JOB_FILE, job, work)
        try:
            _prepare(folder)
            write_text_whole(work / JOB_FILE, json.dumps(job, indent=1, sort_keys=True) + "\n")
            yield folder
            refuse_existing(output)
            os.rename(folder.bundle, output)
            shutil.rmtree(work)
        except Exception:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except BaseException:
            if any(folder.notes.iterdir()):
                progress(f"stopped; what is finished is kept in {work}: the same command goes on from there")
            else:
                shutil.rmtree(work, ignore_errors=True)
            raise


def _lock(descriptor: int, work: Path, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another export is writing {output} (its work folder is {work}); wait for it or choose another --output"
        ) from None


def _check_job(path: Path, job: Mapping[str, Any], work: Path) -> None:
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *job} if before.get(name) != job.get(name))
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)}, is {job.get(name)}" for name in changed)
        raise UsageError(f"an unfinished export of another kind lies in {work} ({listed}); remove it and run again")


def _prepare(folder: WorkFolder) -> None:
    """Make the folders; delete what an earlier run left half done."""
    for path in (folder.bundle, folder.notes):
        path.mkdir(exist_ok=True)
    kept = folder.kept_files
    for path in sorted(folder.bundle.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.resolve() not in kept:
            path.unlink()


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256_of(path), size_bytes=path.stat().st_size)


def _is(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size_bytes and sha256_of(path) == record.sha256
