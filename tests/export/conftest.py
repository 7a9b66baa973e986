"""Exports of the reference student, made once a session through the command, and a small odd model made here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bundle.manifest import Precision, Target

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
STUDENT = REFERENCE / "student"
CONTEXT = 320  # 144 visual tokens, the longest golden question and 32 answer tokens fit


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line of a failed command."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0]


Command = Callable[..., Ran]
Exported = Callable[[Target, Precision], Path]


@pytest.fixture
def run_export(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run alignkd-export in this process."""

    def run(*arguments: str | Path) -> Ran:
        from export.cli import main

        monkeypatch.setattr(sys, "argv", ["alignkd-export", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capfd.readouterr()
        return Ran(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The reference student exported to a target at a precision; read it, never change it."""
    from export.frame import ExportJob, export_bundle

    root = tmp_path_factory.mktemp("exported")

    def export(target: Target, precision: Precision) -> Path:
        output = root / f"{target}-{precision}"
        if not output.exists():
            export_bundle(ExportJob(STUDENT, target, precision, output, CONTEXT), progress=lambda line: None)
        return output

    return export


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes share the machine; torch alone would take every core in each."""
    torch.set_num_threads(1)


HfCheckpoint = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HfCheckpoint:
    """A tiny Hugging Face LLaVA of a decoder and a tower, by their model types; read it, never change it."""
    from tests.export.hf_checkpoints import write_checkpoint

    root = tmp_path_factory.mktemp("hf")

    def written(text: str, tower: str) -> Path:
        folder = root / f"{text}-{tower}"
        if not folder.exists():
            write_checkpoint(folder, text, tower)
        return folder

    return written
