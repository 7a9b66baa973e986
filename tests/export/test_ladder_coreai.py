"""The ladder on Core AI assets, run by Apple's runtime: healthy ones pass, each fault is named by stage and kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import VerificationError
from bundle.manifest import GraphName, Manifest
from bundle.runtimes import coreai_interpreter
from bundle.runtimes.coreai_asset import CONSTANT, PROGRAM_FILE, constant_names, copy_constant, open_asset
from export.contract import ExportedGraphs
from tests.export import ladder

if coreai_interpreter.available() is not None:
    pytest.skip(str(coreai_interpreter.available()), allow_module_level=True)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportedGraphs]:
    """The tiny model at int4, written once; read it, never change it."""
    folder = tmp_path_factory.mktemp("coreai")
    return folder, ladder.written("coreai", "int4", folder)


@pytest.fixture
def copied(graphs: tuple[Path, ExportedGraphs], tmp_path: Path) -> tuple[Path, Manifest]:
    """A recorded bundle that may be changed."""
    shutil.copytree(graphs[0], tmp_path / "copy")
    return tmp_path / "copy", ladder.recorded(tmp_path / "copy", "coreai", "int4", graphs[1])


def test_a_healthy_bundle_raises_no_alarm(copied: tuple[Path, Manifest]) -> None:
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) is None and verdict.family == "evaluator"
    assert verdict.runtime.startswith("Core AI's CPU runtime (coreai-core ")
    first = next(row for row in verdict.stages if row.stage == "first_logits")
    assert first.error < 1e-3 < first.quantization_error, "what is lost is lost by the weights"


@pytest.mark.parametrize("fault", ladder.MODELS)
def test_a_graph_that_computes_something_else(fault: str, graphs: tuple[Path, ExportedGraphs], tmp_path: Path) -> None:
    wrong, stage = ladder.MODELS[fault]
    shutil.copytree(graphs[0], tmp_path / "copy")
    manifest = ladder.recorded(tmp_path / "copy", "coreai", "int4", graphs[1], wrong(ladder.tiny_vlm()))
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
        ladder.recorded(tmp_path, "coreai", "int4", graphs[1], dequantized=stored)
    assert f"stage '{stage}', kind quantization" in str(refused.value) and f"'{name}'" in str(refused.value)


def rewrite(copied: tuple[Path, Manifest], graph: GraphName, change: Callable[[str, Any, Any], None]) -> None:
    """Apply ``change`` (name, operation, the wheel's ir module) to each operation of a program, and write it again."""
    path = copied[0] / copied[1].graphs[graph].path
    names, place = constant_names(path), 0
    metadata = (path / "metadata.json").read_bytes()
    program = open_asset(path).program
    ir = import_module("coreai._compiler.ir")
    with program._module._mlir_module.context, ir.Location.unknown():
        for operation in program._get_graph("main").bodyRegion.blocks[0].operations:
            name = ""
            if operation.name == CONSTANT and operation.result.type.shape:
                name, place = names.get(place, ""), place + 1
            change(name, operation, ir)
        program.save_asset(path)
    (path / "metadata.json").write_bytes(metadata)


def with_values(operation: Any, ir: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the values of a float16 constant."""
    kind = operation.result.type
    values = change(copy_constant(operation).view(np.float16).reshape(tuple(kind.shape)).copy())
    elements = import_module("coreai._compiler.dialects.coreai.constant").create_elements_attr
    operation.attributes["value"] = elements(ir.Location.unknown(), kind, values.astype(np.float16))


def test_one_altered_block_scale_in_the_file(copied: tuple[Path, Manifest]) -> None:
    scales = "language_model.layers.0.mlp.down_proj.weight.scale"

    def change(name: str, operation: Any, ir: Any) -> None:
        if name == scales:
            with_values(operation, ir, lambda values: np.concatenate((values[:1] * 32, values[1:])))

    rewrite(copied, "text_decoder", change)
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) == ("first_logits", "quantization") and scales in str(verdict.diagnosis)


def test_a_quantized_rotary_table_is_the_graphs(copied: tuple[Path, Manifest]) -> None:
    changed = []

    def change(name: str, operation: Any, ir: Any) -> None:
        if name in ("cos", "sin"):
            with_values(operation, ir, lambda values: np.round(values * 7) / 7)
            changed.append(name)

    rewrite(copied, "text_decoder", change)
    assert sorted(changed) == ["cos", "sin"]
    assert ladder.found(ladder.judged(*copied)) == ("first_logits", "graph")


def test_swapped_keys_and_values(copied: tuple[Path, Manifest]) -> None:
    """What attention reads is swapped; the states are written as before."""
    swapped = []

    def change(name: str, operation: Any, ir: Any) -> None:
        if operation.name == "coreai.invoke" and "@sdpa" in str(operation):
            _, keys, values, *_ = operation.operands
            operation.operands[1], operation.operands[2] = values, keys
            swapped.append(operation)

    rewrite(copied, "text_decoder", change)
    assert swapped
    verdict = ladder.judged(*copied)
    assert verdict.diagnosis is not None and verdict.diagnosis.kind == "graph"
    assert verdict.diagnosis.stage in ("first_logits", "greedy_tokens")


def test_a_damaged_program_is_one_line_and_not_the_end_of_the_process(copied: tuple[Path, Manifest]) -> None:
    path = copied[0] / copied[1].graphs["text_decoder"].path
    program = bytearray((path / PROGRAM_FILE).read_bytes())
    program[len(program) // 2] ^= 1
    (path / PROGRAM_FILE).write_bytes(program)
    with pytest.raises(VerificationError, match="main.mlirb was changed"):
        ladder.judged(*copied)
