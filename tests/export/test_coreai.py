"""Core AI assets, run by Apple's runtime on Linux, against the torch model that holds the same weights."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bundle.errors import BackendMissingError, UsageError, VerificationError
from bundle.manifest import Graph, GraphName, Manifest, Precision
from bundle.replay import relative_error
from bundle.runtimes import coreai, coreai_asset, coreai_interpreter
from bundle.runtimes.coreai import CoreAiRuntime
from bundle.runtimes.coreai_asset import constant_names, read_asset
from bundle.runtimes.registry import first_entry
from distill.models.mobilevlm import MobileVlm
from export.contract import ExportedGraphs, ExportRequest
from export.coreai.convert import convert, load_converter
from export.coreai.modules import CoreAiEmbedding, with_weights
from export.coreai.to_coreai import export_coreai, export_graph
from export.coreai.weights import pack, read_back
from export.model.shape import model_shape
from export.targets import load_exporter
from export.weights.recipe import Storage
from tests.export.conftest import Command
from tests.export.models import random_vlm

ROOT = Path(__file__).parents[2]
CONTEXT = 48
WHEEL = coreai_interpreter.available()
needs_wheel = pytest.mark.skipif(WHEEL is not None, reason=str(WHEEL))
# Widened to float32: what tables in float16 move; at fp32 the order of sums alone.
GRAPH_ERROR: dict[Precision, float] = {"fp32": 1e-5, "int4": 1e-3}
AS_DECLARED = 2e-2  # every result and every partial sum rounded to float16


@dataclass(frozen=True)
class Export:
    """One model as Core AI assets."""

    vlm: MobileVlm  # as it was
    twin: MobileVlm  # with the weights that the assets hold
    folder: Path
    written: ExportedGraphs
    precision: Precision

    @property
    def manifest(self) -> Manifest:
        """As much of a manifest as a runtime reads."""
        shape = model_shape(self.vlm, CONTEXT)
        return SimpleNamespace(model=shape, graphs=self.written.graphs, precision=self.precision)  # type: ignore[return-value]

    def runtime(self) -> CoreAiRuntime:
        return coreai_interpreter.open_runtime(self.folder, self.manifest, None)

    def asset(self, name: GraphName) -> Path:
        return self.folder / self.written.graphs[name].path


def request(vlm: MobileVlm, precision: Precision, folder: Path) -> ExportRequest:
    return ExportRequest(vlm, precision, CONTEXT, Path("tokenizer.model"), (2,), 1, folder, lambda line: None)


Exports = Callable[[Precision], Export]


@pytest.fixture(scope="session")
def coreai_export(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A small model with shared key-value heads and a down_proj that 32 does not divide, once per precision."""
    root = tmp_path_factory.mktemp("coreai")
    made: dict[Precision, Export] = {}

    def export(precision: Precision) -> Export:
        if precision not in made:
            vlm, folder = random_vlm(feed_forward=80), root / precision
            folder.mkdir()
            before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
            written = export_coreai(request(vlm, precision, folder))
            assert all(torch.equal(weight, before[name]) for name, weight in vlm.state_dict().items())
            twin = MobileVlm(vlm.config).eval()
            twin.load_state_dict(before | dict(written.dequantized))
            made[precision] = Export(vlm, twin, folder, written, precision)
        return made[precision]

    return export


@torch.no_grad()
def check_stages(made: Export, runtime: CoreAiRuntime, tolerance: float) -> None:
    """Image, embeddings, and a prefill in two pieces with single tokens behind it, against torch."""
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 40, 7, 23, 9]])
    visual, embeddings = made.twin.encode_images(pixels), made.twin.get_input_embeddings()(ids)
    rows = torch.cat([embeddings, visual, embeddings], 1)  # [1, 19, D]
    hidden = made.twin.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
    wanted = made.twin.lm_head(hidden)[0].numpy()
    assert relative_error(runtime.encode_image(pixels.numpy()), visual.numpy()) < tolerance
    assert relative_error(runtime.embed(ids.numpy()), embeddings.numpy()) < tolerance
    for start, end in [(0, 5), (5, 17), (17, 18), (18, 19)]:
        logits = runtime.decode(rows[:, start:end].numpy())
        assert logits.shape == (48,)
        assert relative_error(logits, wanted[end - 1]) < tolerance
    assert runtime.position == 19


@needs_wheel
@pytest.mark.parametrize("precision", GRAPH_ERROR)
def test_every_stage_equals_torch(precision: Precision, coreai_export: Exports) -> None:
    made = coreai_export(precision)
    check_stages(made, made.runtime(), GRAPH_ERROR[precision])


@needs_wheel
def test_the_program_as_it_is_computes_the_same_in_float16(coreai_export: Exports) -> None:
    made = coreai_export("int4")
    runtime = coreai_interpreter.open_runtime(made.folder, made.manifest, None, rounding="float16")
    check_stages(made, runtime, AS_DECLARED)


@needs_wheel
def test_sequences_end_and_begin_anew(coreai_export: Exports) -> None:
    made = coreai_export("fp32")
    runtime = made.runtime()
    rows = np.random.default_rng(0).normal(size=(1, CONTEXT, 64)).astype(np.float32)
    first, second = runtime.decode(rows[:, :6]), runtime.decode(rows[:, 6:7])
    runtime.reset()
    np.testing.assert_array_equal(runtime.decode(rows[:, :6]), first)
    np.testing.assert_array_equal(runtime.decode(rows[:, 6:7]), second)
    assert np.isfinite(runtime.decode(rows[:, 7:])).all() and runtime.position == CONTEXT
    with pytest.raises(UsageError, match="49 tokens do not fit the context of 48"):
        runtime.decode(rows[:, :1])
    with pytest.raises(UsageError, match="token id 48 is outside the vocabulary of 48"):
        runtime.embed(np.array([[3, 48]]))
    runtime.close()


@needs_wheel
def test_a_bundle_opens_inside_an_event_loop(coreai_export: Exports) -> None:
    """As every cell of a notebook runs in one."""

    async def cell() -> int:
        runtime = coreai_export("fp32").runtime()
        width = runtime.embed(np.array([[1, 2]])).shape[-1]
        runtime.close()
        return width

    assert asyncio.run(cell()) == 64


@needs_wheel
def test_weights_are_stored_as_the_recipe_says(coreai_export: Exports) -> None:
    made = coreai_export("int4")
    stored = {}
    for graph in made.written.graphs:
        names = constant_names(made.asset(graph))
        constants, quantized = read_asset(made.asset(graph))
        stored |= {names[constant.place]: constant.kind for constant in constants if constant.place in names}
        assert len(quantized) == sum(name.endswith(".scale") for name in names.values())
    layer = "language_model.layers.1."
    assert stored[layer + "self_attn.q_proj.weight"] == stored[layer + "mlp.up_proj.weight"] == "si4"
    assert stored[layer + "mlp.down_proj.weight"] == stored["lm_head.weight"] == "si8"  # 32 does not divide 80
    assert stored["language_model.embed_tokens.weight"] == "si8"
    assert stored["vision_tower.encoder.layers.0.mlp.fc1.weight"] == stored["projector.linear_1.weight"] == "si8"
    assert stored["cos"] == stored["sin"] == stored[layer + "self_attn.q_proj.weight.scale"] == "f16"
    kinds = {name: kind for name, kind in stored.items() if kind.startswith("si")}
    assert set(made.written.dequantized) >= set(kinds) and all(name.endswith("weight") for name in kinds)
    assert coreai_export("fp32").written.dequantized == {}


@needs_wheel
def test_reading_back_misses_what_was_given_to_another_layer(tmp_path: Path) -> None:
    module, weight = CoreAiEmbedding(random_vlm()), torch.randn(48, 64)
    name, graph = "language_model.embed_tokens.weight", embedding_graph(tmp_path)
    packed = {name: pack(weight, Storage(8, None), torch.float16)}
    convert(
        with_weights(module, {}, packed, torch.float16),
        (torch.ones(1, 4, dtype=torch.int32),),
        graph,
        tmp_path / "a.aimodel",
    )
    values, names = read_back(tmp_path / "a.aimodel", {}, packed)
    assert sorted(names.values()) == [name, name + ".scale"]
    assert relative_error(values[name], weight.numpy()) < 1e-2
    other = {name: pack(weight * 1.01, Storage(8, None), torch.float16)}  # the same integers, other scales
    with pytest.raises(VerificationError, match=f"does not hold '{name}' as it was given"):
        read_back(tmp_path / "a.aimodel", {}, other)


def embedding_graph(folder: Path) -> Graph:
    from bundle.manifest import Tensor

    return Graph(
        path="a.aimodel",
        inputs=(Tensor(name="input_ids", dtype="int32", shape=(1, None)),),
        outputs=(Tensor(name="embeddings", dtype="float16", shape=(1, None, 64)),),
    )


@needs_wheel
def test_a_program_of_another_signature_is_refused(tmp_path: Path) -> None:
    vlm = random_vlm()
    module, graph = CoreAiEmbedding(vlm), embedding_graph(tmp_path)
    floats = {"language_model.embed_tokens.weight": vlm.get_input_embeddings().weight}
    twin = with_weights(module, floats, {}, torch.float32)  # the graph says float16
    with pytest.raises(VerificationError, match="a.aimodel: outputs: .*Float32.*, expected .*Float16"):
        convert(twin, (torch.ones(1, 4, dtype=torch.int32),), graph, tmp_path / "a.aimodel")


def test_four_bits_have_the_error_that_the_source_says() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, Storage(4, 32), torch.float16)
    assert packed.codes.min() >= -8 and packed.codes.max() == 7 and packed.scale.shape == (256, 16)
    found = packed.codes.float().reshape(256, 16, 32) * packed.scale.float()[..., None]
    assert float((found.reshape(256, 512) - weight).norm() / weight.norm()) == pytest.approx(8.7e-2, rel=0.02)
    nothing = pack(torch.zeros(2, 32), Storage(4, 32), torch.float16)
    assert not nothing.codes.any() and not nothing.scale.any()


@needs_wheel
def test_the_same_export_gives_the_same_bytes_and_says_nothing(
    coreai_export: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = coreai_export("fp32")
    capfd.readouterr()
    export_graph(request(made.vlm, "fp32", tmp_path), "vision_encoder")
    assert capfd.readouterr() == ("", "")
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        name = path.relative_to(tmp_path)
        assert digest(path) == digest(made.folder / name), name


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs_wheel
def test_the_runtime_needs_no_torch(coreai_export: Exports) -> None:
    made = coreai_export("int4")
    graphs = {name: graph.model_dump() for name, graph in made.written.graphs.items()}
    program = f"""
import sys
for name in ("torch", "coreai_torch", "coremltools"):
    sys.modules[name] = None
import json, types, pathlib
import numpy as np
from bundle.manifest import Graph, ModelShape
from bundle.runtimes import coreai_interpreter
graphs = {{name: Graph(**graph) for name, graph in json.loads({json.dumps(graphs)!r}).items()}}
shape = ModelShape(**json.loads({made.manifest.model.model_dump_json()!r}))
manifest = types.SimpleNamespace(graphs=graphs, model=shape, precision="int4")
runtime = coreai_interpreter.open_runtime(pathlib.Path({str(made.folder)!r}), manifest, None)
print(runtime.embed(np.array([[1, 2, 3]])).shape)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, "(1, 3, 64)\n"), run.stderr
    assert run.stderr == "", "the engine's own chatter"


@needs_wheel
def test_the_bundle_is_a_folder_of_apples_runner(exported: Callable[[str, str], Path]) -> None:
    bundle = exported("coreai", "int4")
    manifest = json.loads((bundle / "manifest.json").read_text())
    stock = json.loads((bundle / "metadata.json").read_text())
    assert (stock["metadata_version"], stock["kind"]) == ("0.2", "vlm")
    assert {role: (bundle / path / "main.mlirb").is_file() for role, path in stock["assets"].items()} == {
        "main": True,
        "embedding": True,
        "vision": True,
    }
    assert stock["language"]["vocab_size"] == manifest["model"]["vocab_size"]
    assert stock["language"]["max_context_length"] == manifest["model"]["context_length"]
    vision = stock["vision"]
    assert (vision["image_size"], vision["patch_size"], vision["image_token_count"]) == (336, 14, 144)
    assert (
        vision["image_strategy"] == manifest["image"]["strategy"] and vision["image_mean"] == manifest["image"]["mean"]
    )
    assert (bundle / "tokenizer" / "tokenizer.json").is_file()
    assert {"metadata.json", "tokenizer/tokenizer.json", "text_decoder.aimodel/main.mlirb"} <= set(manifest["files"])


# --- without the wheel ---


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither coreai-core nor coreai-torch were installed."""
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> object:
        return None if name.startswith("coreai") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(coreai_asset, "find_spec", find_spec)
    for name in ("coreai", "coreai_torch"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_wheel_an_export_is_one_line(no_wheel: None, run_export: Command, tmp_path: Path) -> None:
    ran = run_export("tests/golden/reference/student", "--target", "coreai", "--int4", "--output", tmp_path / "bundle")
    assert ran.code == 2 and "'coreai_torch' is not installed; run: pip install 'alignkd[coreai]'" in ran.error
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(UsageError, match="alignkd\\[coreai\\]"):
        load_exporter("coreai")
    with pytest.raises(UsageError, match="'coreai-torch' is not installed"):
        load_converter()


def test_without_the_wheel_nothing_runs_the_bundle(no_wheel: None, tmp_path: Path) -> None:
    with pytest.raises(BackendMissingError) as missing:
        first_entry("coreai")
    assert missing.value.exit_code == 6
    assert "coreai_interpreter: coreai-core is not installed (it has wheels for Linux on x86-64" in str(missing.value)
    with pytest.raises(UsageError, match="'coreai-core' is not installed"):
        coreai_asset.open_asset(tmp_path)


def test_core_ai_itself_asks_for_macos_27(monkeypatch: pytest.MonkeyPatch, no_wheel: None) -> None:
    if sys.platform != "darwin":
        assert coreai.available() == "needs macOS 27"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("26.7", ("", "", ""), "arm64"))
    assert coreai.available() == "needs macOS 27 or later, this is 26.7"
    monkeypatch.setattr("platform.mac_ver", lambda: ("27.0", ("", "", ""), "arm64"))
    assert "coreai-core is not installed" in str(coreai.available())
    assert coreai_interpreter.available() == "is for Linux; on a Mac Core AI itself runs"
