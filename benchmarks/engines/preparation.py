"""Peers and a checkpoint -> their environments and files below the cache folder, made once; or one line why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.peers import HERE, ROOT, Environment, Peer

LINES = 1  # of a failed command's output that the reason quotes


class NotPreparedError(Exception):
    """Why a peer cannot take part, in one line."""


@dataclass(frozen=True)
class Prepared:
    """A peer that can be measured."""

    peer: Peer
    python: Path
    output: Path

    def files(self, part: str) -> list[Path]:
        """Every file that the part reads, for its size."""
        named = self.output / (self.peer.text if part == "text" else self.peer.vision or "")
        if named.suffix == ".xml":
            return [named, named.with_suffix(".bin")]
        return [named] if named.is_file() else sorted(path for path in named.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Cache:
    """The folder that outlives a run."""

    folder: Path
    progress: Callable[[str], None]

    def environment(self, wanted: Environment) -> Path:
        """The python of a virtual environment with the wanted packages, made if it is not there."""
        folder = self.folder / "environments" / wanted.name
        python, done = folder / "bin" / "python", folder / "requirements.txt"
        listed = "\n".join(wanted.requirements) + "\n"
        if done.is_file() and done.read_text(encoding="utf-8") == listed:
            return python
        self.progress(f"installing {', '.join(wanted.requirements)} into {folder}")
        self._run([sys.executable, "-m", "venv", "--clear", str(folder)], f"{wanted.name}: no environment")
        self._run([str(python), "-m", "pip", "install", *wanted.requirements], f"{wanted.name} cannot be installed")
        if wanted.without:
            command = [str(python), "-m", "pip", "uninstall", "-y", *wanted.without]
            self._run(command, f"{wanted.name} cannot be mended")
        done.write_text(listed, encoding="utf-8")
        return python

    def part(self, name: str, script: str, checkpoint: Path) -> Path:
        """A part of the checkpoint in a form that other tools read, by one of our scripts."""
        output = self.folder / "converted" / name
        path = HERE / "convert" / script
        self._convert([sys.executable, str(path), str(checkpoint), "{output}"], output, checkpoint)
        return output

    def prepare(self, name: str, peer: Peer, checkpoint: Path) -> Prepared:
        """Install and convert.

        Raises:
            NotPreparedError: a command failed; its last line.
        """
        python = self.environment(peer.runs_in)
        output = self.folder / "converted" / name
        if not _is_of(output, checkpoint):
            converter = python if peer.converts_in is None else self.environment(peer.converts_in)
            words = {
                "python": str(converter),
                "packages": str(next(converter.parents[1].glob("lib/python3*/site-packages"))),
                "checkpoint": str(checkpoint),
                "llama": str(self.part("llama", "llama_folder.py", checkpoint)),
            }
            if "{vision}" in peer.convert:
                words["vision"] = str(self.part("vision", "vision_trace.py", checkpoint))
            self._convert([fill(word, words) for word in peer.convert], output, checkpoint)
        return Prepared(peer, python, output)

    def _convert(self, command: list[str], output: Path, checkpoint: Path) -> None:
        """Run a command that writes {output}, aside and renamed when whole."""
        if _is_of(output, checkpoint):
            return
        self.progress(f"converting {checkpoint} to {output}")
        shutil.rmtree(output, ignore_errors=True)
        aside = output.with_name(output.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self._run([fill(word, {"output": str(aside)}) for word in command], f"{output.name}: conversion failed")
        aside.rename(output)
        _mark(output).write_text(f"{checkpoint.resolve()}\n", encoding="utf-8")

    def _run(self, command: list[str], failure: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # nothing is fetched from a hub
        done = subprocess.run(
            command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | offline,
        )
        if done.returncode != 0:
            last = [line.strip() for line in done.stdout.splitlines() if line.strip()][-LINES:] or ["no message"]
            raise NotPreparedError(f"{failure} ({last[0]})")


def fill(word: str, values: Mapping[str, str]) -> str:
    """Replace {name} by its value; other braces stay."""
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def _mark(output: Path) -> Path:
    return output.with_name(output.name + ".source")


def _is_of(output: Path, checkpoint: Path) -> bool:
    """Whether ``output`` was made whole of this checkpoint."""
    mark = _mark(output)
    return output.is_dir() and mark.is_file() and mark.read_text(encoding="utf-8").strip() == str(checkpoint.resolve())
