"""The comparison of methods runs and its rows are in the order that they must be."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.export.conftest import STUDENT
from tests.export.quantize.calibration_set import write_set

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_method_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    quantization = importlib.import_module("quantization")
    data = str(write_set(tmp_path))
    quantization.main([str(STUDENT), "--calibration", data, "--held-out", data])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    losses = {row[0]: float(row[1]) for row in rows}
    assert len(losses) == 7
    assert losses["int8"] < 0.1 * min(loss for name, loss in losses.items() if name != "int8")
    assert losses["gptq, onnx"] < losses["rtn, onnx"] and losses["gptq, executorch and coreml"] < losses["rtn, coreml"]
