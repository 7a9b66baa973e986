"""The ladder on ONNX graphs: healthy ones pass, each planted fault is named by its stage and its kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bundle import image
from bundle.errors import VerificationError
from bundle.manifest import Manifest, Precision
from export.contract import ExportedGraphs
from export.onnx import linear as onnx_linear
from tests.export import ladder

PRECISIONS: tuple[Precision, ...] = ("int4", "int8", "fp16", "fp32")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], tuple[Path, ExportedGraphs]]:
    """The tiny model at a precision, written once; read it, never change it."""
    made: dict[Precision, tuple[Path, ExportedGraphs]] = {}

    def of(precision: Precision) -> tuple[Path, ExportedGraphs]:
        if precision not in made:
            folder = tmp_path_factory.mktemp(precision)
            made[precision] = folder, ladder.written("onnx", precision, folder)
        return made[precision]

    return of


@pytest.fixture
def copied(graphs: Callable[[Precision], tuple[Path, ExportedGraphs]], tmp_path: Path) -> tuple[Path, Manifest]:
    """A recorded int4 bundle that may be changed."""
    folder, exported = graphs("int4")
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", ladder.recorded(tmp_path / "copy", "onnx", "int4", exported)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_healthy_bundle_raises_no_alarm(
    precision: Precision, graphs: Callable[[Precision], tuple[Path, ExportedGraphs]]
) -> None:
    folder, exported = graphs(precision)
    verdict = ladder.judged(folder, ladder.recorded(folder, "onnx", precision, exported))
    assert ladder.found(verdict) is None
    assert verdict.rows == 64 and verdict.agreed > 32
    rows = {row.stage: row for row in verdict.stages}
    rounds = precision in ("int4", "int8")
    assert (rows["first_logits"].quantization_error > 1e-3) == rounds, "weights"
    assert (rows["first_logits"].activation_error > 1e-3) == rounds, "activations: neither weights nor graph"


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("fault", ladder.MODELS)
def test_a_graph_that_computes_something_else(
    fault: str, precision: Precision, graphs: Callable[[Precision], tuple[Path, ExportedGraphs]]
) -> None:
    wrong, stage = ladder.MODELS[fault]
    folder, exported = graphs(precision)
    manifest = ladder.recorded(folder, "onnx", precision, exported, wrong(ladder.tiny_vlm()))
    assert ladder.found(ladder.judged(folder, manifest)) == (stage, "graph")


@pytest.mark.parametrize("fault", ladder.DRIVERS)
def test_a_graph_that_is_driven_wrongly(fault: str, copied: tuple[Path, Manifest]) -> None:
    spoil, stage = ladder.DRIVERS[fault]
    assert ladder.found(ladder.judged(*copied, spoil)) == (stage, "graph")


@pytest.mark.parametrize("fault", ladder.WEIGHTS)
def test_weights_that_the_exporter_spoils_are_named(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, spoil, stage = ladder.WEIGHTS[fault]
    weight_of = onnx_linear.ModelWriter.weight

    def spoilt(writer: onnx_linear.ModelWriter, asked: str) -> np.ndarray:
        weight = weight_of(writer, asked)
        return spoil(torch.from_numpy(weight)).numpy() if asked == name else weight

    def in_pieces(writer: onnx_linear.ModelWriter, asked: str, count: int) -> Iterator[np.ndarray]:
        return iter(np.array_split(spoilt(writer, asked), count))

    monkeypatch.setattr(onnx_linear.ModelWriter, "weight", spoilt)
    monkeypatch.setattr(onnx_linear.ModelWriter, "chunks", in_pieces)
    exported = ladder.written("onnx", "int4", tmp_path / "bundle")
    with pytest.raises(VerificationError) as refused:
        ladder.recorded(tmp_path / "bundle", "onnx", "int4", exported)
    assert f"stage '{stage}', kind quantization" in str(refused.value) and f"'{name}'" in str(refused.value)
    if fault == "one group scaled":
        assert "row 5, group 1 of 32 values" in str(refused.value) and "(1 groups so;" in str(refused.value)


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def external(path: Path, name: str, dtype: type[np.generic]) -> np.memmap:
    """The stored numbers of one initializer, to be overwritten."""
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    count = int(place["length"]) // np.dtype(dtype).itemsize
    return np.memmap(path.parent / place["location"], dtype, "r+", int(place["offset"]), (count,))


def decoder_of(copied: tuple[Path, Manifest]) -> Path:
    return copied[0] / copied[1].graphs["text_decoder"].path


def test_one_altered_block_scale_in_the_file(copied: tuple[Path, Manifest]) -> None:
    scales = external(decoder_of(copied), "lm_head.weight_scales", np.float32)
    scales[0] *= 40
    scales.flush()
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) == ("first_logits", "quantization")
    assert "1 constants of" in str(verdict.diagnosis) and "lm_head.weight_scales" in str(verdict.diagnosis)


def test_a_rotary_table_of_another_base_in_the_file_is_the_graphs(copied: tuple[Path, Manifest]) -> None:
    for name, wave in (("rotary_cos", np.cos), ("rotary_sin", np.sin)):
        table = external(decoder_of(copied), name, np.float32)
        half = table.size // ladder.CONTEXT
        angles = np.arange(ladder.CONTEXT)[:, None] * 500.0 ** (-np.arange(half) / half)
        table[:] = wave(angles).astype(np.float32).ravel()
        table.flush()
    verdict = ladder.judged(*copied)
    assert ladder.found(verdict) == ("first_logits", "graph") and "rotary_cos, rotary_sin" in str(verdict.diagnosis)


def test_a_quantized_rotary_table_shows_where_no_kernel_rounds(
    graphs: Callable[[Precision], tuple[Path, ExportedGraphs]], tmp_path: Path
) -> None:
    folder, exported = graphs("fp32")
    shutil.copytree(folder, tmp_path / "copy")
    manifest = ladder.recorded(tmp_path / "copy", "onnx", "fp32", exported)
    for name in ("rotary_cos", "rotary_sin"):
        table = external(decoder_of((tmp_path / "copy", manifest)), name, np.float32)
        table[:] = np.round(table * 127) / 127
        table.flush()
    assert ladder.found(ladder.judged(tmp_path / "copy", manifest)) == ("first_logits", "graph")


def test_swapped_keys_and_values(copied: tuple[Path, Manifest]) -> None:
    def swap(model: onnx.ModelProto) -> None:
        other = {"key": "value", "value": "key"}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                stem, _, kind = name.rpartition(".")
                if stem.startswith("past_key_values"):
                    node.input[index] = f"{stem}.{other[kind]}"

    edit(decoder_of(copied), swap)
    assert ladder.found(ladder.judged(*copied)) == ("greedy_tokens", "graph"), "a prefill starts from empty caches"


def test_bilinear_and_a_space_are_preprocessing(copied: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = copied
    spaced = manifest.model_copy(update={"prompt": manifest.prompt.model_copy(update={"suffix": " "})})
    verdict = ladder.judged(folder, spaced)
    assert ladder.found(verdict) == ("prompt", "preprocessing")
    assert "character 33: ' ' here, '' recorded" in str(verdict.diagnosis)
    monkeypatch.setitem(image.FILTERS, "bicubic", image.Image.Resampling.BILINEAR)
    assert ladder.found(ladder.judged(folder, manifest)) == ("pixels", "preprocessing")
