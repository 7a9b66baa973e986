"""The committed contract vectors are what the script makes of today's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "tests/golden/contract"


def test_the_script_makes_the_committed_vectors(tmp_path: Path) -> None:
    fresh = tmp_path / "contract"
    subprocess.run([sys.executable, "scripts/make_contract_vectors.py", str(fresh)], cwd=ROOT, check=True, timeout=60)
    names = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(CONTRACT).as_posix() for path in CONTRACT.rglob("*") if path.is_file())
    for name in names:
        if name.endswith(".json"):
            assert (fresh / name).read_text() == (CONTRACT / name).read_text(), name
        else:
            assert np.array_equal(np.asarray(Image.open(fresh / name)), np.asarray(Image.open(CONTRACT / name))), name


def test_it_does_not_overwrite(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/make_contract_vectors.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "remove it first" in done.stderr
