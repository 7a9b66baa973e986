"""The ladder on ML programs, evaluated here: healthy ones pass, each planted fault is named by stage and kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import VerificationError
from bundle.manifest import Engine, Manifest
from bundle.runtimes import coreml_inputs
from bundle.runtimes.mil_graph import block_of, blocks_of
from bundle.runtimes.mil_proto import DATA_FOLDER, MODEL_FILE, read_spec, weight_path
from bundle.runtimes.mil_weights import BLOB_METADATA
from export.contract import CoreMlOptions, ExportedGraphs
from tests.export import ladder

DOWN = "language_model_layers_0_mlp_down_proj_weight_to_fp16"
ENGINES: tuple[Engine, ...] = ("gpu", "ane")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Engine, tuple[Path, ExportedGraphs]]:
    """The tiny model at int4, written once for each engine; read it, never change it."""
    made: dict[Engine, tuple[Path, ExportedGraphs]] = {}
    for engine in ENGINES:
        folder = tmp_path_factory.mktemp(engine)
        made[engine] = folder, ladder.written("coreml", "int4", folder, coreml=CoreMlOptions(engine))
    return made


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture
def graphs(engine: Engine, written: dict[Engine, tuple[Path, ExportedGraphs]]) -> tuple[Path, ExportedGraphs]:
    return written[engine]


@pytest.fixture
def copied(graphs: tuple[Path, ExportedGraphs], tmp_path: Path) -> tuple[Path, Manifest]:
    """A recorded bundle that may be changed."""
    shutil.copytree(graphs[0], tmp_path / "copy")
    return tmp_path / "copy", ladder.recorded(tmp_path / "copy", "coreml", "int4", graphs[1])


def test_a_healthy_bundle_raises_no_alarm(copied: tuple[Path, Manifest]) -> None:
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) is None and verdict.family == "evaluator"
    first = next(row for row in verdict.stages if row.stage == "first_logits")
    assert first.error < 2e-3 < first.quantization_error, "what is lost is lost by the weights"


@pytest.mark.parametrize("fault", ladder.MODELS)
def test_a_graph_that_computes_something_else(fault: str, graphs: tuple[Path, ExportedGraphs], tmp_path: Path) -> None:
    wrong, stage = ladder.MODELS[fault]
    shutil.copytree(graphs[0], tmp_path / "copy")
    manifest = ladder.recorded(tmp_path / "copy", "coreml", "int4", graphs[1], wrong(ladder.tiny_vlm()))
    assert ladder.found(ladder.judged(tmp_path / "copy", manifest)) == (stage, "graph")


@pytest.mark.parametrize("fault", ladder.DRIVERS)
def test_a_graph_that_is_driven_wrongly(fault: str, copied: tuple[Path, Manifest]) -> None:
    spoil, stage = ladder.DRIVERS[fault]
    assert ladder.found(ladder.judged(*copied, spoil)) == (stage, "graph")


def test_a_mask_that_hides_the_first_rows(copied: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("causal_mask", "static_mask"):  # one of each engine
        healthy = getattr(coreml_inputs, name)

        def hiding(*sizes: int, healthy: Any = healthy) -> np.ndarray:
            mask = healthy(*sizes).copy()  # [1, 1, rows, columns]
            mask[..., 4:, :4] = -1e4
            return mask

        monkeypatch.setattr(coreml_inputs, name, hiding)
    assert ladder.found(ladder.judged(*copied)) == ("first_logits", "graph")


@pytest.mark.parametrize("fault", ladder.WEIGHTS)
def test_weights_that_were_packed_wrongly_are_named(
    fault: str, graphs: tuple[Path, ExportedGraphs], tmp_path: Path
) -> None:
    name, spoil, stage = ladder.WEIGHTS[fault]
    stored = dict(graphs[1].dequantized)
    stored[name] = spoil(stored[name])
    with pytest.raises(VerificationError) as refused:
        ladder.recorded(tmp_path, "coreml", "int4", graphs[1], dequantized=stored)
    assert f"stage '{stage}', kind quantization" in str(refused.value) and f"'{name}'" in str(refused.value)


def blob(package: Path, prefix: str, dtype: type[np.generic], parameter: str = "val") -> np.memmap:
    """The stored numbers of the first constant whose name begins so, to be overwritten."""
    for operation in operations(read_spec(package)):
        if not operation.outputs or not operation.outputs[0].name.startswith(prefix):
            continue
        value = operation.attributes["val"] if parameter == "val" else operation.inputs[parameter].arguments[0].value
        path, offset = weight_path(package), int(value.blobFileValue.offset)
        _, _, size, start, _ = BLOB_METADATA.unpack(path.read_bytes()[offset : offset + BLOB_METADATA.size])
        return np.memmap(path, dtype, "r+", start, (size // np.dtype(dtype).itemsize,))
    raise AssertionError(f"no constant {prefix}")


def operations(spec: Any) -> Iterator[Any]:
    """Of all functions."""
    return (operation for block in blocks_of(spec) for operation in block.operations)


def decoder_of(copied: tuple[Path, Manifest]) -> Path:
    return copied[0] / copied[1].graphs["text_decoder"].path


def test_one_altered_scale_or_table_in_the_file(engine: Engine, copied: tuple[Path, Manifest]) -> None:
    parameter = {"gpu": "scale", "ane": "lut"}[engine]
    values = blob(decoder_of(copied), DOWN, np.float16, parameter)
    values[0] *= 32  # of one block of 32 values, or of the lowest 16th of 16 rows
    values.flush()
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) == ("first_logits", "quantization")
    assert f"{DOWN}.{parameter}" in str(verdict.diagnosis)


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("engine", ["gpu"], indirect=True)
def test_a_quantized_rotary_table_is_the_graphs(levels: int, copied: tuple[Path, Manifest]) -> None:
    for name in ("cos_to_fp16", "sin_to_fp16"):
        table = blob(decoder_of(copied), name, np.float16)
        table[:] = np.round(table * levels) / levels
        table.flush()
    assert ladder.found(ladder.judged(*copied)) == ("first_logits", "graph")


def rewrite(package: Path, spec: Any) -> None:
    (package / DATA_FOLDER / MODEL_FILE).write_bytes(spec.SerializeToString())


def test_swapped_key_and_value_states(copied: tuple[Path, Manifest]) -> None:
    package = decoder_of(copied)
    spec, other = read_spec(package), {"k_cache": "v_cache", "v_cache": "k_cache"}
    swapped = 0
    for operation in operations(spec):
        if operation.type == "read_state":  # what attention reads; writes stay where they were
            binding = operation.inputs["input"].arguments[0]
            binding.name = other[binding.name]
            swapped += 1
    assert swapped
    rewrite(package, spec)
    verdict = ladder.judged(*copied)
    assert verdict.diagnosis is not None and verdict.diagnosis.kind == "graph"
    assert verdict.diagnosis.stage in ("first_logits", "greedy_tokens")


# --- what only the Neural Engine's graphs have: inputs that say where the rows stand, and two functions ---

INPUTS = {
    "angles of 7 levels": (("cos", "sin"), lambda x: np.round(x * 7) / 7, "first_logits"),
    "angles in reverse": (("cos", "sin"), lambda x: x[:, :, ::-1], "first_logits"),  # shifted ones change nothing
    "logits of the row before": (("last_row",), lambda x: np.roll(x, -1, 3), "first_logits"),
    "rows written one further": (("position",), lambda x: x + 1, "first_logits"),
}


@pytest.mark.parametrize("fault", INPUTS)
@pytest.mark.parametrize("engine", ["ane"], indirect=True)
def test_wrong_inputs(fault: str, copied: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    names, spoil, stage = INPUTS[fault]
    healthy = coreml_inputs.static_inputs

    def spoilt(*arguments: Any) -> dict[str, np.ndarray]:
        inputs = healthy(*arguments)
        return inputs | {name: spoil(inputs[name]) for name in names}

    monkeypatch.setattr(coreml_inputs, "static_inputs", spoilt)
    assert ladder.found(ladder.judged(*copied)) == (stage, "graph")


@pytest.mark.parametrize("engine", ["ane"], indirect=True)
def test_the_function_for_single_rows_has_a_weight_of_another_matrix(copied: tuple[Path, Manifest]) -> None:
    package = decoder_of(copied)
    spec = read_spec(package)
    weights = {
        operation.outputs[0].name: operation
        for operation in block_of(spec, "decode").operations
        if operation.type == "constexpr_lut_to_dense"
    }
    gate, up = (weights[f"language_model_layers_0_mlp_{part}_proj_weight_to_fp16"] for part in ("gate", "up"))
    gate.inputs["indices"].CopyFrom(up.inputs["indices"])
    rewrite(package, spec)
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) == ("greedy_tokens", "quantization"), "the prompt is still answered"
    assert "language_model_layers_0_mlp_gate_proj_weight_to_fp16.indices" in str(verdict.diagnosis)
