"""The ladder on a .pte: a healthy one passes, each planted fault is named by its stage and its kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bundle.constants import _executorch as constants_of
from bundle.errors import VerificationError
from bundle.manifest import Manifest
from export.contract import ExportedGraphs
from tests.export import ladder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportedGraphs]:
    """The tiny model at int4, written once; read it, never change it."""
    folder = tmp_path_factory.mktemp("executorch")
    return folder, ladder.written("executorch", "int4", folder)


@pytest.fixture
def copied(graphs: tuple[Path, ExportedGraphs], tmp_path: Path) -> tuple[Path, Manifest]:
    """A recorded bundle that may be changed."""
    shutil.copytree(graphs[0], tmp_path / "copy")
    return tmp_path / "copy", ladder.recorded(tmp_path / "copy", "executorch", "int4", graphs[1])


def test_a_healthy_bundle_raises_no_alarm(copied: tuple[Path, Manifest]) -> None:
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) is None and verdict.rows == 64
    first = next(row for row in verdict.stages if row.stage == "first_logits")
    assert min(first.error, first.activation_error, first.quantization_error) > 1e-3
    assert first.total_error <= (first.quantization_error + first.error * (1 + first.quantization_error)) * 1.001


@pytest.mark.parametrize("fault", ladder.MODELS)
def test_a_graph_that_computes_something_else(fault: str, graphs: tuple[Path, ExportedGraphs], tmp_path: Path) -> None:
    wrong, stage = ladder.MODELS[fault]
    shutil.copytree(graphs[0], tmp_path / "copy")
    manifest = ladder.recorded(tmp_path / "copy", "executorch", "int4", graphs[1], wrong(ladder.tiny_vlm()))
    assert ladder.found(ladder.judged(tmp_path / "copy", manifest)) == (stage, "graph")


@pytest.mark.parametrize("fault", ladder.DRIVERS)
def test_a_graph_that_is_driven_wrongly(fault: str, copied: tuple[Path, Manifest]) -> None:
    spoil, stage = ladder.DRIVERS[fault]
    assert ladder.found(ladder.judged(*copied, spoil)) == (stage, "graph")


@pytest.mark.parametrize("fault", ladder.WEIGHTS)
def test_weights_that_were_packed_wrongly_are_named(
    fault: str, graphs: tuple[Path, ExportedGraphs], tmp_path: Path
) -> None:
    name, spoil, stage = ladder.WEIGHTS[fault]
    stored = dict(graphs[1].dequantized)
    stored[name] = spoil(stored[name])
    with pytest.raises(VerificationError) as refused:
        ladder.recorded(tmp_path, "executorch", "int4", graphs[1], dequantized=stored)
    assert f"stage '{stage}', kind quantization" in str(refused.value) and f"'{name}'" in str(refused.value)


def test_one_altered_scale_in_the_file(copied: tuple[Path, Manifest], graphs: tuple[Path, ExportedGraphs]) -> None:
    path = copied[0] / copied[1].graphs["text_decoder"].path
    content = bytearray(path.read_bytes())
    # scales of the int8 head: a float32 for each token; six more in the exponent are 64 times the scale
    size = ladder.VOCABULARY * 4
    scales = [(key, part) for key, part in constants_of(path) if key.startswith("scale_") and len(part) == size]
    assert len(scales) == 1, "one matrix of the model has as many channels"
    at = bytes(content).index(bytes(scales[0][1])) + 2  # of little-endian bytes, exponent and sign are the last two
    content[at : at + 2] = (int.from_bytes(content[at : at + 2], "little") + (6 << 7)).to_bytes(2, "little")
    path.write_bytes(content)
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) == ("first_logits", "quantization")
    assert "1 constants of model.pte are not those of the recording: scale_" in str(verdict.diagnosis)


def test_constants_are_read_without_the_whole_file(graphs: tuple[Path, ExportedGraphs]) -> None:
    parts = dict(constants_of(graphs[0] / "model.pte"))
    table = ladder.VOCABULARY * 64
    assert sum(len(part) == table for part in parts.values()) >= 1, "the int8 embedding table is among them"
    assert np.isclose(sum(map(len, parts.values())), (graphs[0] / "model.pte").stat().st_size, rtol=0.7)
