"""alignkd-doctor: its table against pyproject.toml, missing extras, broken layers, and one target for real."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle import dependencies, doctor, doctor_cli
from bundle.dependencies import DEPENDENCIES, EXTRAS, Found, satisfies

ROOT = Path(__file__).parents[2]
PASSING = [
    'print(\'{"layer": "import", "seconds": 1.5}\', flush=True)',
    'print(\'{"layer": "export", "seconds": 2.5}\', flush=True)',
    'print(\'{"layer": "run", "seconds": 0.5, "runtime": "engine 1.0", "covers": "CPU"}\', flush=True)',
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, Any]]:
    """alignkd-doctor in this process -> exit code, stdout, the JSON of its last line."""

    def command(*arguments: str) -> tuple[int, str, Any]:
        monkeypatch.setattr("sys.argv", ["alignkd-doctor", "--json", *arguments])
        with pytest.raises(SystemExit) as leaving:
            doctor_cli.main()
        out = capsys.readouterr().out
        return int(str(leaving.value.code)), out, json.loads(out.splitlines()[-1])

    return command


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a stand-in for export/smoke.py before the real one on the path of child processes."""

    def script(body: str) -> None:
        (tmp_path / "export").mkdir(exist_ok=True)
        (tmp_path / "export/__init__.py").write_text("")
        (tmp_path / "export/smoke.py").write_text("import os, sys\ntarget = sys.argv[-1]\n" + body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return script


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The versions that the doctor finds: all as tested, until a test changes one."""
    versions: dict[str, str | None] = {one.package: one.tested for one in DEPENDENCIES}
    monkeypatch.setattr(dependencies, "installed_version", versions.__getitem__)
    return versions


def test_the_table_is_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted: dict[str, tuple[str, list[str]]] = {}
    for extra in ("", *EXTRAS):
        listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
        for line in listed:
            package = re.match(r"[\w.-]+", line).group()  # type: ignore[union-attr]
            requirement, extras = wanted.setdefault(package, (line.removeprefix(package), []))
            assert requirement == line.removeprefix(package), f"{package} is asked for in two ways"
            extras += [extra] if extra else []
    assert {one.package: (one.requirement, list(one.extras)) for one in DEPENDENCIES} == wanted
    assert {extra for extra in project["optional-dependencies"]} == {*EXTRAS, "all", "dev"}
    assert all(satisfies(one.tested, one.requirement) for one in DEPENDENCIES)


@pytest.mark.parametrize(
    ("version", "requirement", "met"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("9", "==9.0", True),
        ("2.4.0", ">=2.0,<2.4", False),
        ("2.3.99", ">=2.0,<2.4", True),
        ("10.0", ">=9", True),
        ("1.9", ">=1.17", False),
        ("13.0.0rc1", ">=13,<14", True),
    ],
)
def test_requirements(version: str, requirement: str, met: bool) -> None:
    assert satisfies(version, requirement) is met


def test_all_fine_is_exit_0(run: Callable, smoke: Callable, installed: dict) -> None:
    smoke("\n".join(PASSING))
    code, out, result = run()
    assert code == 0 and result["ok"] and "all that is installed works" in out
    assert [report["state"] for report in result["targets"]] == ["works"] * 4
    assert result["targets"][0]["layers_s"] == {"import": 1.5, "export": 2.5, "run": 0.5}
    assert "engine 1.0" in out and result["host"]["memory_bytes"] > 1 << 28 and result["host"]["cores"] >= 1


@pytest.mark.parametrize(
    ("package", "target"),
    [("onnxruntime", "onnx"), ("executorch", "executorch"), ("scipy", "coreml"), ("coreai-core", "coreai")],
)
def test_a_missing_extra_is_named_with_its_command_and_is_no_fault(
    run: Callable, smoke: Callable, installed: dict, package: str, target: str
) -> None:
    smoke("\n".join(PASSING))
    installed[package] = None
    code, out, result = run()
    assert code == 0 and result["ok"]
    assert f"not installed: {target}; run: pip install 'alignkd[{target}]'" in out
    states = {report["target"]: report["state"] for report in result["targets"]}
    assert [name for name, state in states.items() if state == "not installed"] == [target]


def test_extras_that_are_no_targets_are_named_too(run: Callable, smoke: Callable, installed: dict) -> None:
    smoke("\n".join(PASSING))
    installed["plotly"] = installed["scikit-image"] = None
    _, out, _ = run()
    assert "not installed: bench; run: pip install 'alignkd[bench]'" in out
    assert "not installed: data; run: pip install 'alignkd[data]'" in out


@pytest.mark.parametrize(("passed", "layer"), [(0, "import"), (1, "export"), (2, "run")])
def test_the_first_broken_layer_is_named_with_what_mends_it(
    run: Callable, smoke: Callable, installed: dict, passed: int, layer: str
) -> None:
    failing = ["if target == 'coreml': sys.exit('noise\\nerror: it does not work')"]
    smoke("\n".join([*PASSING[:passed], *failing, *PASSING[passed:]]))
    code, out, result = run()
    assert code == 1
    assert result["first_broken"] == {
        "layer": f"coreml {layer}",
        "problem": "it does not work",
        "command": "pip install --force-reinstall 'alignkd[coreml]'",
    }
    assert f"first broken layer: coreml {layer} (it does not work); run: pip install" in out and "BROKEN" in out
    assert [report["state"] for report in result["targets"]] == ["works", "works", "broken", "works"]


def test_a_version_outside_the_tested_range_is_what_the_command_pins(
    run: Callable, smoke: Callable, installed: dict
) -> None:
    smoke("if target == 'coreml': sys.exit('error: no such dtype')\n" + "\n".join(PASSING))
    installed["numpy"], installed["coremltools"] = "2.5.0", "8.3"
    code, _, result = run()
    assert code == 1
    assert result["first_broken"]["command"] == "pip install 'numpy>=2.0,<2.4' 'coremltools==9.0'"
    numpy = next(row for row in result["dependencies"] if row["package"] == "numpy")
    assert (numpy["state"], numpy["found"], numpy["tested"][:3]) == ("untested", "2.5.0", "2.3")


def test_an_untested_version_that_works_is_no_fault(run: Callable, smoke: Callable, installed: dict) -> None:
    smoke("\n".join(PASSING))
    installed["onnxruntime"] = "1.40.0"
    code, out, _ = run()
    assert code == 0 and "untested" in out


def test_a_crash_and_a_hang_are_named(run: Callable, smoke: Callable, installed: dict, monkeypatch: Any) -> None:
    smoke(PASSING[0] + "\nif target == 'onnx': os.kill(os.getpid(), 11)\n" + "\n".join(PASSING[1:]))
    _, _, result = run("--target", "onnx")
    assert result["first_broken"]["layer"] == "onnx export"
    assert result["first_broken"]["problem"] == "the process was ended by signal 11"
    monkeypatch.setattr(doctor, "LIMIT_S", 0.5)
    smoke(PASSING[0] + "\nimport time; time.sleep(20)")
    code, _, result = run("--target", "onnx")
    assert code == 1 and result["first_broken"]["problem"] == "took longer than 0.5 s"
    assert len(result["targets"]) == 1


def test_a_missing_base_package_comes_first(run: Callable, smoke: Callable, installed: dict) -> None:
    smoke("sys.exit('error: broken as well')")
    installed["pillow"] = None
    code, _, result = run("--target", "onnx")
    assert code == 1
    assert result["first_broken"] == {
        "layer": "base",
        "problem": "not installed: pillow",
        "command": "pip install 'pillow>=13,<14'",
    }


def test_found_versions_are_those_of_this_environment() -> None:
    found = {one.dependency.package: one for one in dependencies.look_up()}
    import numpy

    assert found["numpy"].version == numpy.__version__ and found["numpy"].state == "ok"
    assert Found(DEPENDENCIES[0], None).state == "missing"


def test_onnx_is_really_exported_and_run(run: Callable) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    code, out, result = run("--target", "onnx")
    assert code == 0, out
    (report,) = result["targets"]
    assert report["state"] == "works" and report["runtime"].startswith("onnxruntime ")
    assert list(report["layers_s"]) == ["import", "export", "run"]


def test_an_engine_that_does_not_import_is_layer_import(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnxruntime.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, _, result = run("--target", "onnx")
    assert code == 1 and result["first_broken"]["layer"] == "onnx import"
    assert "cannot open shared object file" in result["first_broken"]["problem"]
