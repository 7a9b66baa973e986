"""The environment that make built: torch is what `pip install torch==2.13.0` gives, and nothing replaced it."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_torch_is_the_pinned_version() -> None:
    assert version("torch").split("+")[0] == "2.13.0"


def test_no_install_replaced_torch(load_script: Callable[[str], ModuleType]) -> None:
    kept = Path(sys.prefix) / "torch-fingerprint.json"
    if not kept.is_file():
        pytest.skip("needs the environment that `make test` builds: it records torch before the other packages")
    assert load_script("torch_fingerprint").fingerprint() == json.loads(kept.read_text())


def test_every_extra_that_needs_torch_pins_the_same_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = {str(r.specifier) for names in extras.values() for r in map(Requirement, names) if r.name == "torch"}
    assert pins == {"==2.13.0"}


def test_installed_packages_satisfy_every_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for names in project["optional-dependencies"].values() for r in names)]
    wrong = [
        f"{r} but found {version(r.name)}"
        for r in map(Requirement, wanted)
        if r.name != "alignkd" and not r.specifier.contains(version(r.name), prereleases=True)
    ]
    assert wrong == []
