"""What only ONNX offers: an int4 embedding table, keys and values as float16; and that cache buffers are shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from bundle.manifest import Precision
from bundle.replay import relative_error
from bundle.runtimes.onnx import OnnxRuntime, open_runtime
from export.contract import ExportedGraphs, ExportRequest, OnnxOptions
from export.frame import ExportJob, export_bundle
from export.model.graph_weights import graph_of
from export.model.shape import model_shape
from export.onnx.to_onnx import export_onnx
from tests.export.conftest import STUDENT, Command
from tests.export.models import random_vlm

CONTEXT = 64
TOKENIZER = STUDENT / "tokenizer.model"
EMBEDDING = "language_model.embed_tokens.weight"


def written(folder: Path, options: OnnxOptions, precision: Precision = "int4") -> ExportedGraphs:
    folder.mkdir()
    request = ExportRequest(
        random_vlm(), precision, CONTEXT, TOKENIZER, (2,), 1, folder, lambda line: None, onnx=options
    )
    return export_onnx(request)


def opened(folder: Path, graphs: ExportedGraphs) -> OnnxRuntime:
    manifest = SimpleNamespace(model=model_shape(random_vlm(), CONTEXT), graphs=graphs.graphs, prefix_cache=None)
    runtime = open_runtime(folder, manifest, threads=1)  # type: ignore[arg-type]
    assert isinstance(runtime, OnnxRuntime)
    return runtime


def test_an_int4_embedding_is_half_as_large_and_ten_times_as_far_off(tmp_path: Path) -> None:
    table = random_vlm().state_dict()[EMBEDDING].numpy()
    error, size = {}, {}
    for name, options in {"int8": OnnxOptions(), "int4": OnnxOptions(int4_embedding=True)}.items():
        graphs = written(tmp_path / name, options)
        error[name] = relative_error(graphs.dequantized[EMBEDDING].numpy(), table)
        graph = onnx.load(tmp_path / name / graphs.graphs["token_embedding"].path)
        size[name] = next(len(tensor.raw_data) for tensor in graph.graph.initializer if "_q" in tensor.name)
        ids = np.array([[1, 7, 40]])
        rows = opened(tmp_path / name, graphs).embed(ids)
        assert relative_error(rows, graphs.dequantized[EMBEDDING].numpy()[ids]) < 1e-6
        assert graphs.quantization["token_embedding"].weights == f"{name} symmetric"
    assert size["int4"] * 2 == size["int8"]
    assert error["int8"] < 1e-2 and 5e-2 < error["int4"] < 0.12


@pytest.mark.parametrize("precision,most", [("fp32", 1e-3), ("int4", 3e-2)])  # int8 activations round another way
def test_a_float16_cache_moves_the_logits_by_float16_rounding(
    tmp_path: Path, precision: Precision, most: float
) -> None:
    rows = np.random.default_rng(0).normal(size=(1, 30, 64)).astype(np.float32)
    logits = {}
    for name, half in {"float32": False, "float16": True}.items():
        graphs = written(tmp_path / name, OnnxOptions(fp16_cache=half), precision)
        caches = [i for i in graphs.graphs["text_decoder"].inputs if i.name.startswith("past_key_values.")]
        assert {cache.dtype for cache in caches} == {name}
        runtime = opened(tmp_path / name, graphs)
        runtime.decode(rows[:, :20])
        for at in range(20, 29):
            runtime.decode(rows[:, at : at + 1])
        logits[name] = runtime.decode(rows[:, 29:])
    assert 0 < relative_error(logits["float16"], logits["float32"]) < most


def test_past_and_present_are_one_buffer_that_stays_where_it_is(tmp_path: Path) -> None:
    runtime = opened(tmp_path / "b", written(tmp_path / "b", OnnxOptions()))
    rows = np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)

    def addresses() -> list[int]:
        return [value.data_ptr() for value in runtime._binding.get_outputs()]

    before = addresses()
    runtime.decode(rows)
    first = [value.numpy().copy() for value in runtime._binding.get_outputs()[:-1]]
    runtime.decode(rows[:, :1])
    second = [value.numpy() for value in runtime._binding.get_outputs()[:-1]]
    assert addresses() == before and len(first) == 2 * 2  # keys and values of two layers, then the logits
    for earlier, later in zip(first, second, strict=True):
        assert earlier.shape[2] == CONTEXT
        np.testing.assert_array_equal(earlier[:, :, :5], later[:, :, :5])
        assert not earlier[:, :, 5:].any() and later[:, :, 5].all() and not later[:, :, 6:].any()


def test_every_weight_belongs_to_the_graph_that_reads_it(tmp_path: Path) -> None:
    vlm = random_vlm()
    graphs = written(tmp_path / "b", OnnxOptions(), "fp32").graphs
    for name, graph in graphs.items():
        model = onnx.load(tmp_path / "b" / graph.path, load_external_data=False).graph
        held = {tensor.name.removesuffix("_q8").removesuffix("_half") for tensor in model.initializer}
        assert held & vlm.state_dict().keys() <= {
            weight for weight in vlm.state_dict() if graph_of(weight, vlm) == name
        }
    unread = [weight for weight in vlm.state_dict() if graph_of(weight, vlm) is None]
    assert {weight.split(".layers.")[-1].split(".")[0] for weight in unread if ".layers." in weight} == {"2"}


def test_both_options_at_once_pass_the_weight_check_and_the_replay(tmp_path: Path) -> None:
    job = ExportJob(STUDENT, "onnx", "int4", tmp_path / "out", onnx=OnnxOptions(int4_embedding=True, fp16_cache=True))
    manifest = export_bundle(job, lambda line: None)
    assert manifest.parity is not None
    off, allowed = manifest.parity.quantization_error, manifest.golden.quantization_tolerances
    assert 5e-2 < off["embeddings"] <= allowed["embeddings"] < 0.25, "held against plain rounding at 4 bits"


@pytest.mark.parametrize(
    "arguments,flag,allowed",
    [
        (("--target", "coreml", "--int4-embedding"), "--int4-embedding", "--int4,"),
        (("--target", "onnx", "--int8", "--int4-embedding"), "--int4-embedding", "--int4,"),
        (("--target", "onnx", "--fp32", "--fp16-cache"), "--fp16-cache", "--int4 or --int8"),
    ],
)
def test_options_where_they_do_not_belong(
    run_export: Command, tmp_path: Path, arguments: tuple[str, ...], flag: str, allowed: str
) -> None:
    ran = run_export(STUDENT, *arguments, "--output", tmp_path / "out")
    assert ran.code == 2 and list(tmp_path.iterdir()) == []
    assert f"{flag} is for --target onnx {allowed}" in ran.error


def test_only_the_graphs_that_the_manifest_names_are_opened(tmp_path: Path) -> None:
    graphs = written(tmp_path / "b", OnnxOptions())
    vision = {"vision_encoder": graphs.graphs["vision_encoder"]}
    runtime = opened(tmp_path / "b", replace(graphs, graphs=vision))
    assert runtime.encode_image(np.zeros((1, 3, 96, 96), np.float32)).shape == (1, 9, 64)
    with pytest.raises(KeyError, match="token_embedding"):
        runtime.embed(np.array([[1]]))
    runtime.close()
