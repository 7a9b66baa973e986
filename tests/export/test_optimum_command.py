"""optimum-cli export alignkd, by the real command line: found through the namespace, the same flags and exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bundle.manifest import read_manifest
from tests.export.conftest import HfCheckpoint

ROOT = Path(__file__).parents[2]
OPTIMUM = Path(sys.executable).parent / "optimum-cli"
pytestmark = pytest.mark.skipif(not OPTIMUM.is_file(), reason="needs optimum (alignkd[onnx])")


def optimum(*arguments: str | Path, folder: Path, second: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run optimum-cli somewhere else, with this source tree on the path as an editable install has it."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(second or ""), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(OPTIMUM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_optimum_lists_the_command_once(tmp_path: Path) -> None:
    second = Path(shutil.copytree(ROOT / "optimum", tmp_path / "checkout" / "optimum"))  # beside the installed one
    listed = optimum("export", "--help", folder=tmp_path, second=second.parent)
    assert listed.returncode == 0 and listed.stdout.count("(alignkd-export)") == 1, listed.stderr


def test_options_may_come_first_and_help_is_ours(tmp_path: Path) -> None:
    shown = optimum("export", "alignkd", "--help", folder=tmp_path)
    assert shown.returncode == 0 and "usage: optimum-cli export alignkd" in shown.stdout
    assert "--int4-embedding" in shown.stdout
    refused = optimum("export", "alignkd", "--target", "onnx", "--output", "b", "nowhere", folder=tmp_path)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: nowhere is no checkpoint")


def test_it_writes_a_bundle(hf_checkpoint: HfCheckpoint, tmp_path: Path) -> None:
    checkpoint = hf_checkpoint("qwen2", "siglip_vision_model")
    ran = optimum("export", "alignkd", checkpoint, "--target", "onnx", "--int4", "--output", "b", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "b"
    assert read_manifest(tmp_path / "b").precision == "int4"


def test_the_wheel_ships_the_file_and_shares_the_namespace() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "optimum" in wheel["packages"]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "optimum").rglob("*.py")]
    assert files == ["optimum/commands/register/register_alignkd.py"]  # an __init__.py would hide optimum itself
