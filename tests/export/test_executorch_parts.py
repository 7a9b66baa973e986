"""Graphs of a .pte are lowered one by one: what a killed export goes on from, the joined file, and what it holds."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bundle.errors import VerificationError
from bundle.pte import open_pte
from export.contract import ExportedGraphs, ExportRequest
from export.executorch import to_executorch
from export.executorch.merge import merge
from export.executorch.quantize import QuantizedAgain
from export.executorch.stored import StoredIntegers, StoredWeights
from export.executorch.to_executorch import FILE, GRAPHS, export_executorch
from export.job.work_folder import WorkFolder, work_folder
from tests.export import ladder

JOB: dict[str, Any] = {"target": "executorch"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A work folder whose export was stopped while its decoder was lowered, and the graphs lowered by then."""
    root = tmp_path_factory.mktemp("killed")
    lowered: list[str] = []
    lower = to_executorch.lower

    def stopping(name: str, *rest: Any) -> None:
        if name == "text_decoder":
            raise KeyboardInterrupt
        lowered.append(name)
        lower(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_executorch, "lower", stopping)
        with pytest.raises(KeyboardInterrupt), work_folder(root / "out", JOB, print) as work:
            export_executorch(request_of(work))
    return root, lowered


@dataclass(frozen=True)
class Resumed:
    """An export that went on: its root folder, what the exporter returned, what was lowered now, and its lines.

    Attributes:
        kept: integer weights that are still in memory afterwards.
    """

    root: Path
    graphs: ExportedGraphs
    lowered: list[str]
    lines: list[str]
    kept: list[tuple[int, ...]]


def integer_weights() -> dict[int, tuple[int, ...]]:
    """Shapes of all that are in memory, by identity."""
    gc.collect()
    tensors = (found for found in gc.get_objects() if type(found) is torch.nn.Parameter)
    return {id(tensor): tuple(tensor.shape) for tensor in tensors if tensor.dtype == torch.int8}


@pytest.fixture(scope="module")
def resumed(killed: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The killed export gone on with."""
    root = tmp_path_factory.mktemp("resumed")
    shutil.copytree(killed[0] / "out.work", root / "out.work")
    lowered: list[str] = []
    lines: list[str] = []
    lower, before = to_executorch.lower, integer_weights()

    def counting(name: str, *rest: Any) -> None:
        lowered.append(name)
        lower(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_executorch, "lower", counting)
        with work_folder(root / "out", JOB, lines.append) as work:
            graphs = export_executorch(request_of(work, lines))
            shutil.copytree(root / "out.work", root / "second.work")
            (root / "second.work" / "lock").unlink()
    kept = [shape for key, shape in integer_weights().items() if key not in before]
    return Resumed(root, graphs, lowered, lines, kept)


def request_of(work: WorkFolder, lines: list[str] | None = None) -> ExportRequest:
    told = [] if lines is None else lines
    tokenizer = ladder.STUDENT / "tokenizer.model"
    return ExportRequest(
        ladder.tiny_vlm(), "int4", ladder.CONTEXT, tokenizer, (2,), 1, work.bundle, told.append, work=work
    )


def test_a_killed_export_keeps_the_graphs_that_were_lowered(killed: tuple[Path, list[str]]) -> None:
    root, lowered = killed
    assert lowered == ["token_embedding", "vision_encoder"]
    left = {path.name for path in (root / "out.work" / "bundle").iterdir()}
    assert left >= {"token_embedding.part.pte", "vision_encoder.part.pte"} and FILE not in left
    assert not (root / "out").exists()


def test_the_same_command_lowers_only_what_is_missing(resumed: Resumed) -> None:
    assert resumed.lowered == ["text_decoder"]
    assert "vision encoder is whole from the run before" in resumed.lines
    assert [path.name for path in (resumed.root / "out").iterdir()] == [FILE], "the parts are gone"


def test_weights_of_a_lowered_graph_are_let_go(resumed: Resumed) -> None:
    """torch's caches hold on to lowered graphs, at 1.7B with 4 GB, until they are emptied."""
    assert resumed.kept == []


def test_a_whole_file_is_not_made_again(resumed: Resumed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while golden vectors were recorded."""
    monkeypatch.setattr(to_executorch, "lower", lambda *given: pytest.fail("lowered again"))
    with work_folder(resumed.root / "second", JOB, print) as work:
        again = export_executorch(request_of(work))
        assert again.dequantized.keys() == resumed.graphs.dequantized.keys()
        assert again.graphs == resumed.graphs.graphs


def test_the_file_holds_the_weights_that_were_quantized(resumed: Resumed) -> None:
    root, vlm = resumed.root, ladder.tiny_vlm()
    held = StoredWeights(root / "out" / FILE, resumed.graphs.dequantized.records)  # type: ignore[attr-defined]
    source = to_executorch.source_of(request_of(WorkFolder(root, root)), "text_decoder")
    wanted = QuantizedAgain(source, held.records)
    assert len(held) == sum(
        name.endswith("weight") and w.dim() == 2 and "position" not in name for name, w in read(vlm)
    )
    for name in held:
        assert torch.equal(held[name], wanted[name]), name
    name = "language_model.layers.0.mlp.up_proj.weight"
    record = held.records[name]
    assert isinstance(record, StoredIntegers) and record.bits == 4
    out = torch.full(record.shape, np.nan)
    held.read_into(name, out)
    assert torch.equal(out, held[name])
    with pytest.raises(VerificationError, match=f"{FILE} does not hold '{name}' as it was quantized"):
        StoredWeights(root / "out" / FILE, {name: record.model_copy(update={"key": "0" * 64})})


def read(vlm: Any) -> list[tuple[str, torch.Tensor]]:
    """The weights that a graph reads."""
    return [(name, w) for name, w in vlm.state_dict().items() if to_executorch.graph_of(name, vlm) is not None]


def test_joined_parts_keep_their_methods_and_their_data(killed: tuple[Path, list[str]], tmp_path: Path) -> None:
    parts = [killed[0] / "out.work" / "bundle" / f"{name}.part.pte" for name in GRAPHS[:2]]
    merge(parts, tmp_path / FILE)
    whole, apart = open_pte(tmp_path / FILE), [open_pte(part) for part in parts]
    assert whole.delegates() == apart[0].delegates() | apart[1].delegates()
    content, places = (tmp_path / FILE).read_bytes(), list(whole.constants())
    named = {key: content[start:end] for key, start, end in places if not key.startswith("constant_segment")}
    nameless = [content[start:end] for key, start, end in places if key.startswith("constant_segment")]
    for part in apart:
        data = part.path.read_bytes()
        for key, start, end in part.constants():
            if key.startswith("constant_segment"):
                assert any(found.startswith(data[start:end]) for found in nameless)
            else:
                assert named[key] == data[start:end]
    assert all(whole.segment(index)[0] % 128 == 0 for index in range(len(whole.program.segments)))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
