"""The README keeps its word: the tree is the tree, its commands exist, its table is what the kept results say."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "docs" / "demo_results").glob("*.json"))


def test_tree_names_every_file(load_script: Callable[[str], ModuleType]) -> None:
    assert load_script("readme_tree").tree() in README, "paste the output of scripts/readme_tree.py"


def test_every_command_it_names_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(re.findall(r"(?<![-\w])alignkd-[a-z]+", README)) == set(scripts)


def test_make_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) <= targets


@pytest.mark.skipif(not RESULTS, reason="needs docs/demo_results, the kept results of a make demo")
def test_table_is_what_the_kept_results_say(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "alignkd-bench", "report", *RESULTS, "--markdown"]
    report = subprocess.run([*command, "--output", tmp_path / "report.html"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    table = [line for line in report.stdout.splitlines() if line.startswith("|")]
    assert table and all(line in README for line in table)
