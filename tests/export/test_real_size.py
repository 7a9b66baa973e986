"""A MobileVLM V2 1.7B-shaped checkpoint through alignkd-export: memory, verdict, and the stock runner's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bundle.golden import read_golden
from bundle.manifest import read_manifest
from tests.export.test_onnx_genai import genai, genai_answer, our_answer

ROOT = Path(__file__).parents[2]
PEAK_BYTES = 8 * 10**9


def command(name: str, *arguments: str | Path) -> str:
    """Run one of our commands or scripts -> its last line on stdout."""
    program = [sys.executable, name] if name.endswith(".py") else [Path(sys.executable).parent / name]
    ran = subprocess.run(
        [*program, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1] if ran.stdout else ""


@pytest.mark.slow
def test_int4_at_real_size(tmp_path: Path) -> None:
    checkpoint, bundle = tmp_path / "mobilevlm-1.7b", tmp_path / "bundle"
    command("scripts/make_real_size_checkpoint.py", "--output", checkpoint)
    exported = json.loads(
        command("alignkd-export", checkpoint, "--target", "onnx", "--int4", "--output", bundle, "--json")
    )
    assert exported["peak_memory_bytes"] < PEAK_BYTES
    assert json.loads(command("alignkd-verify", bundle, "--json"))["ok"]
    manifest = read_manifest(bundle)
    golden, model = read_golden(bundle, manifest), genai.Model(str(bundle))
    for case in golden.cases:
        assert genai_answer(model, manifest, golden, case) == our_answer(bundle, manifest, golden, case), case.name
