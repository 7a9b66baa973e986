"""Core ML packages, evaluated by the interpreter, against the torch model that holds the same weights."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bundle.errors import UsageError, VerificationError
from bundle.manifest import Graph, GraphName, Manifest, Precision, Tensor
from bundle.replay import relative_error
from bundle.runtimes import coreml, coreml_interpreter
from bundle.runtimes.coreml import CoreMlRuntime
from bundle.runtimes.coreml_inputs import causal_mask
from bundle.runtimes.coreml_interpreter import CoreMlInterpreter
from bundle.runtimes.mil_graph import block_of
from bundle.runtimes.mil_program import Program, Rounding
from bundle.runtimes.mil_proto import read_spec
from distill.models.mobilevlm import MobileVlm
from export.contract import ExportedGraphs, ExportRequest
from export.coreml import to_coreml
from export.coreml.checks import Budget, check_package
from export.coreml.convert import convert, flat_name
from export.coreml.fill import MAIN, write_package
from export.coreml.layout import Layout
from export.coreml.modules import CoreMlDecoder, CoreMlVision
from export.coreml.to_coreml import GraphExporter, export_coreml
from export.coreml.weights import Package, PackageWeights, check_weights
from export.job.work_folder import WorkFolder
from export.model.shape import model_shape
from export.weights.recipe import Storage
from tests.export.models import random_vlm

CONTEXT = 48
ROOT = Path(__file__).parents[2]
# Left in float32 arithmetic: RoPE tables and the 1.702 of quick GELU in float16; at fp32 the order of sums alone.
GRAPH_ERROR: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-3, "int4": 2e-3}
DEVICE_ERROR = 1e-2  # every result rounded to float16


@dataclass(frozen=True)
class Export:
    """One model as Core ML packages."""

    vlm: MobileVlm  # as it was
    twin: MobileVlm  # with the weights that the packages hold
    folder: Path
    written: ExportedGraphs

    @property
    def manifest(self) -> Manifest:
        """As much of a manifest as a runtime reads."""
        return SimpleNamespace(  # type: ignore[return-value]
            model=model_shape(self.vlm, CONTEXT), graphs=self.written.graphs, coreml=self.written.coreml
        )

    def runtime(self, rounding: Rounding = "float32") -> CoreMlInterpreter:
        return CoreMlInterpreter(self.folder, self.manifest, rounding)

    def package(self, name: GraphName) -> Path:
        return self.folder / self.written.graphs[name].path


def request(vlm: MobileVlm, precision: Precision, folder: Path) -> ExportRequest:
    return ExportRequest(vlm, precision, CONTEXT, Path("tokenizer.model"), (2,), 1, folder, lambda line: None)


@pytest.fixture(scope="session")
def coreml_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Export]:
    """A small model with shared key-value heads and a down_proj that 32 does not divide, once per precision."""
    root = tmp_path_factory.mktemp("coreml")
    made: dict[Precision, Export] = {}

    def export(precision: Precision) -> Export:
        if precision not in made:
            vlm, folder = random_vlm(feed_forward=80), root / precision
            folder.mkdir()
            before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
            written = export_coreml(request(vlm, precision, folder))
            assert all(torch.equal(weight, before[name]) for name, weight in vlm.state_dict().items())
            twin = MobileVlm(vlm.config).eval()
            twin.load_state_dict(before | dict(written.dequantized))
            made[precision] = Export(vlm, twin, folder, written)
        return made[precision]

    return export


Exports = Callable[[Precision], Export]


@torch.no_grad()
def torch_logits(vlm: MobileVlm, rows: torch.Tensor) -> np.ndarray:
    """Embeddings [1, L, D] -> logits [L, V]."""
    return vlm.lm_head(vlm.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state)[0].numpy()


# --- the graphs compute what the model computes ---


@pytest.mark.parametrize("precision", GRAPH_ERROR)
def test_every_stage_equals_torch(precision: Precision, coreml_export: Exports) -> None:
    made = coreml_export(precision)
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 40, 7, 23, 9]])
    with torch.no_grad():
        visual, embeddings = made.twin.encode_images(pixels), made.twin.get_input_embeddings()(ids)
    rows = torch.cat([embeddings, visual, embeddings], 1)  # [1, 19, D]
    wanted = torch_logits(made.twin, rows)
    tolerances: dict[Rounding, float] = {"float32": GRAPH_ERROR[precision], "float16": DEVICE_ERROR}
    for rounding, tolerance in tolerances.items():
        runtime = made.runtime(rounding)
        assert relative_error(runtime.encode_image(pixels.numpy()), visual.numpy()) < tolerance
        np.testing.assert_array_equal(runtime.embed(ids.numpy()), embeddings.numpy())
        # prefill in two pieces, then token by token
        for start, end in [(0, 5), (5, 15), (15, 16), (16, 17), (17, 18), (18, 19)]:
            logits = runtime.decode(rows[:, start:end].numpy())
            assert logits.shape == (48,)
            assert relative_error(logits, wanted[end - 1]) < tolerance
        assert runtime.position == 19


def test_reset_starts_a_new_sequence(coreml_export: Exports) -> None:
    runtime = coreml_export("int4").runtime()
    rows = np.random.default_rng(0).normal(size=(1, 6, 64)).astype(np.float32)
    first = runtime.decode(rows)
    following = runtime.decode(rows[:, :1])
    runtime.reset()
    assert runtime.position == 0
    np.testing.assert_array_equal(runtime.decode(rows), first)
    np.testing.assert_array_equal(runtime.decode(rows[:, :1]), following)


def test_a_full_context_is_usable_and_one_more_is_refused(coreml_export: Exports) -> None:
    made = coreml_export("fp32")
    runtime = made.runtime()
    rows = torch.randn(1, CONTEXT, 64, generator=torch.Generator().manual_seed(1))
    runtime.decode(rows[:, : CONTEXT - 1].numpy())
    last = runtime.decode(rows[:, CONTEXT - 1 :].numpy())
    assert relative_error(last, torch_logits(made.twin, rows)[-1]) < 1e-5
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        runtime.decode(rows[:, :1].numpy())


@pytest.mark.parametrize("token", [-200, 48])
def test_an_id_outside_the_vocabulary_is_refused(token: int, coreml_export: Exports) -> None:
    with pytest.raises(UsageError, match=f"token id {token} is outside the vocabulary of 48"):
        coreml_export("int4").runtime().embed(np.array([[3, token]]))


def test_large_activations_do_not_overflow_float16(coreml_export: Exports) -> None:
    """LLaMA's residual stream reaches hundreds; its plain square is infinite in float16 above 255."""
    made = coreml_export("fp16")
    rows = 2000 * torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2))
    logits = made.runtime("float16").decode(rows.numpy())
    assert relative_error(logits, torch_logits(made.twin, rows)[-1]) < DEVICE_ERROR


def one_graph(vlm: MobileVlm, part: type[CoreMlVision], package: Path) -> Program:
    graph = Graph(
        path=package.name,
        inputs=(Tensor(name="pixel_values", dtype="float32", shape=(1, 3, 96, 96)),),
        outputs=(Tensor(name="visual_tokens", dtype="float32", shape=(1, 9, 64)),),
    )
    room = package.parent
    converted = convert(part(vlm), (torch.rand(1, 3, 96, 96),), graph, "fp32", CONTEXT, frozenset(), room)
    write_package(package, {MAIN: converted}, frozenset(), load=lambda name, shape: pytest.fail(name))
    assert [path.name for path in room.iterdir()] == [package.name], "the converter's own files are gone"
    return Program(package)


def test_a_patch_grid_that_pooling_does_not_divide(tmp_path: Path) -> None:
    vlm = random_vlm(patch=13)  # 7 x 7 patches, 3 x 3 visual tokens, plain GELU
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    found = one_graph(vlm, CoreMlVision, tmp_path / "vision.mlpackage")({"pixel_values": pixels.numpy()})
    with torch.no_grad():
        assert relative_error(found["visual_tokens"], vlm.encode_images(pixels).numpy()) < 1e-5


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (3, 1), (4, 2)])
def test_decoder_module_equals_the_model(heads: int, kv_heads: int) -> None:
    vlm = random_vlm(hidden=96, heads=heads, kv_heads=kv_heads)
    module = CoreMlDecoder(vlm, CONTEXT)
    rows = torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(4))
    wanted = torch_logits(vlm, rows)
    for start, end in [(0, 7), (7, 8), (8, 9)]:
        with torch.no_grad():
            logits = module(rows[:, start:end], torch.from_numpy(causal_mask(start, end - start)))
        assert relative_error(logits[0, 0].numpy(), wanted[end - 1]) < 1e-5


# --- what is stored ---


def test_weights_are_stored_as_the_recipe_says(coreml_export: Exports) -> None:
    made = coreml_export("int4")
    packages = [Package(made.package(graph)) for graph in made.written.graphs]
    stored = {name: package[name].bits for package in packages for name in package}
    layer = "language_model_layers_1"
    assert {stored[f"{layer}_self_attn_{part}_proj_weight"] for part in "qkvo"} == {4}
    assert stored[f"{layer}_mlp_gate_proj_weight"] == 4
    assert stored[f"{layer}_mlp_down_proj_weight"] == 8  # 80 wide: no multiple of 32
    assert stored["lm_head_weight"] == stored["language_model_embed_tokens_weight"] == 8
    assert stored["vision_tower_encoder_layers_0_mlp_fc1_weight"] == stored["projector_linear_2_weight"] == 8
    assert stored["language_model_norm_weight"] == stored["vision_tower_embeddings_patch_embedding_weight"] == 16
    decoder = made.written.quantization["text_decoder"]
    assert decoder.weights == "int4 symmetric, down_proj and lm_head int8 symmetric per channel"
    assert (decoder.group_size, decoder.activations) == (32, "float16")
    assert made.written.quantization["vision_encoder"].weights == "int8 symmetric"


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_rope_tables_are_never_quantized(precision: Precision, coreml_export: Exports) -> None:
    made = coreml_export(precision)
    stored = Package(made.package("text_decoder"))
    module = CoreMlDecoder(made.vlm, CONTEXT)
    for name, table in {"cos": module.cos, "sin": module.sin}.items():
        assert stored[name].bits == 16
        np.testing.assert_array_equal(stored[name].values, table.half().float().numpy())


def test_dequantized_weights_are_within_their_steps(coreml_export: Exports) -> None:
    errors = {}
    for precision in ("fp16", "int8", "int4"):
        made = coreml_export(precision)
        weights = made.vlm.state_dict()
        errors[precision] = {
            name: relative_error(weight.numpy(), weights[name].numpy())
            for name, weight in made.written.dequantized.items()
        }
    assert not coreml_export("fp32").written.dequantized
    assert 0 < max(errors["fp16"].values()) < 1e-3
    four_bit = {name for name, error in errors["int4"].items() if error > 3e-2}
    names = {f"self_attn.{part}_proj" for part in "qkvo"} | {"mlp.gate_proj", "mlp.up_proj"}
    assert four_bit == {f"language_model.layers.{i}.{name}.weight" for i in (0, 1) for name in names}
    assert max(errors["int4"].values()) < 0.15 and max(errors["int8"].values()) < 1e-2
    assert "language_model.layers.1.input_layernorm.weight" in errors["int4"]  # rounding to float16 counts too
    # the part of the tower behind the layer that is read is in no file
    assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in errors["int4"])


def test_weights_of_another_layer_are_refused(coreml_export: Exports) -> None:
    made = coreml_export("int4")
    first, second = (f"language_model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    weights, package = made.vlm.state_dict(), made.package("text_decoder")
    four, eight = Storage(4, 32), Storage(8, None)
    assert set(check_weights(package, {first: Layout(first)}, {first: four}, weights)) == {first}
    with pytest.raises(VerificationError, match=f"'{first}' is up to .* its 4-bit steps allow"):
        check_weights(package, {first: Layout(second)}, {first: four}, weights)
    with pytest.raises(VerificationError, match=f"'{first}' is stored in 4 bits, asked for 8"):
        check_weights(package, {first: Layout(first)}, {first: eight}, weights)
    with pytest.raises(VerificationError, match="holds no constant for weight 'gone.weight'"):
        check_weights(package, {"gone.weight": Layout(first)}, {"gone.weight": four}, weights)


def test_weights_that_the_converter_merged_or_dropped_are_known(tmp_path: Path) -> None:
    vlm = random_vlm()
    layers: Any = vlm.language_model.layers
    layers[1].mlp.up_proj.weight.data.copy_(layers[0].mlp.up_proj.weight)
    layers[1].input_layernorm.weight.data.copy_(layers[0].input_layernorm.weight)
    vlm.language_model.norm.weight.data.fill_(1)  # never trained: a product with ones
    exporter = GraphExporter(request(vlm, "int4", tmp_path))
    found = PackageWeights(exporter.export("text_decoder")[2], exporter.shapes)
    assert flat_name("language_model.norm.weight") not in Package(tmp_path / "text_decoder.mlpackage")
    assert "language_model.norm.weight" not in found  # ones are ones in float16 too
    for name in ("mlp.up_proj.weight", "input_layernorm.weight"):
        assert torch.equal(found[f"language_model.layers.0.{name}"], found[f"language_model.layers.1.{name}"])


def test_the_same_export_gives_the_same_bytes(coreml_export: Exports, tmp_path: Path) -> None:
    made = coreml_export("int4")
    GraphExporter(request(made.vlm, "int4", tmp_path)).export("token_embedding")
    found, wanted = (digests(folder / "token_embedding.mlpackage") for folder in (tmp_path, made.folder))
    assert found == wanted and len(found) == 3


def test_graphs_of_a_killed_run_are_taken_over(
    coreml_export: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = coreml_export("int4")
    folder = WorkFolder(Path(shutil.copytree(made.folder, tmp_path / "bundle")), tmp_path / "notes")
    folder.notes.mkdir()
    for name in ("vision_encoder", "text_decoder"):
        files = [path for path in (folder.bundle / f"{name}.mlpackage").rglob("*") if path.is_file()]
        folder.finish(name, files, {})
    shutil.rmtree(folder.bundle / "token_embedding.mlpackage")
    converted: list[str] = []

    def counting(module: torch.nn.Module, *arguments: Any) -> Any:
        converted.append(type(module).__name__)
        return convert(module, *arguments)

    monkeypatch.setattr(to_coreml, "convert", counting)
    again = export_coreml(replace(request(made.vlm, "int4", folder.bundle), work=folder))
    assert converted == ["CoreMlEmbedding"]
    assert digests(folder.bundle) == digests(made.folder) and again.graphs == made.written.graphs
    assert set(again.dequantized) == set(made.written.dequantized)
    assert folder.finished("token_embedding") is not None


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the specification ---


def budget(made: Export) -> Budget:
    names = [name for name, _ in CoreMlDecoder(made.vlm, CONTEXT).named_parameters()]
    sizes = {name: made.vlm.state_dict()[name].numel() for name in names}
    return Budget({name: 16 for name in names}, sizes, spare_bytes=40_000)


def test_the_specification_is_what_the_manifest_says(coreml_export: Exports) -> None:
    made = coreml_export("fp16")
    decoder = made.written.graphs["text_decoder"]
    assert decoder.states[0] == Tensor(name="k_cache", dtype="float16", shape=(2, 2, CONTEXT, 32))
    check_package(made.package("text_decoder"), decoder, {MAIN: None}, CONTEXT, budget(made), "gpu")
    assert coreml_export("fp32").written.graphs["text_decoder"].states == decoder.states  # Core ML has no other states
    spec = read_spec(made.package("text_decoder"))
    assert spec.specificationVersion == 9
    kinds = [operation.type for operation in block_of(spec).operations]
    assert kinds.count("scaled_dot_product_attention") == 2 and kinds.count("write_state") == 4


WRONG: dict[str, tuple[Callable[[Graph, Budget], tuple[Graph, int, Budget]], str]] = {
    "context": (lambda g, b: (g, CONTEXT + 1, b), "sizes of input 'inputs_embeds': .*48.*, expected .*49"),
    "width": (
        lambda g, b: (
            g.model_copy(update={"inputs": (g.inputs[0].model_copy(update={"shape": (1, None, 65)}), g.inputs[1])}),
            CONTEXT,
            b,
        ),
        "sizes of input 'inputs_embeds'",
    ),
    "dtype": (
        lambda g, b: (
            g.model_copy(update={"outputs": (g.outputs[0].model_copy(update={"dtype": "float32"}),)}),
            CONTEXT,
            b,
        ),
        "dtype of output 'logits': float16, expected float32",
    ),
    "name": (
        lambda g, b: (
            g.model_copy(update={"outputs": (g.outputs[0].model_copy(update={"name": "scores"}),)}),
            CONTEXT,
            b,
        ),
        "output names: .*logits.*, expected .*scores",
    ),
    "states": (lambda g, b: (g.model_copy(update={"states": g.states[:1]}), CONTEXT, b), "states: .*v_cache"),
    "unquantized": (
        lambda g, b: (g, CONTEXT, replace(b, bits=dict.fromkeys(b.bits, 4), spare_bytes=0)),
        "weight.bin has [0-9]+ bytes; its [0-9]+ weights take at most",
    ),
}


@pytest.mark.parametrize("change,message", WRONG.values(), ids=WRONG.keys())
def test_a_package_that_differs_from_its_manifest_is_refused(
    change: Callable[[Graph, Budget], tuple[Graph, int, Budget]], message: str, coreml_export: Exports
) -> None:
    made = coreml_export("fp16")
    with pytest.raises(VerificationError, match=f"text_decoder.mlpackage: {message}"):
        graph, longest, allowed = change(made.written.graphs["text_decoder"], budget(made))
        check_package(made.package("text_decoder"), graph, {MAIN: None}, longest, allowed, "gpu")


# --- around it ---


def test_the_reference_student_as_a_bundle(exported: Callable[[str, str], Path]) -> None:
    from bundle.manifest import read_manifest
    from bundle.verify import verify_bundle

    bundle = exported("coreml", "int4")
    manifest = read_manifest(bundle)
    assert manifest.parity is not None
    assert manifest.parity.graph_error["visual_tokens"].relative_error < 1e-4
    assert manifest.parity.graph_error["first_logits"].relative_error < 5e-3
    (verdict,) = verify_bundle(bundle)
    assert verdict.first_bad is None and verdict.covers == "CPU semantics; Neural Engine not covered"


def test_the_interpreter_needs_no_torch(coreml_export: Exports, tmp_path: Path) -> None:
    made = coreml_export("int4")
    pixels = np.random.default_rng(6).normal(size=(1, 3, 96, 96)).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from pathlib import Path
from bundle.runtimes.coreml_interpreter import available
from bundle.runtimes.mil_program import Program
assert available() is None
folder = Path({str(tmp_path)!r})
tokens = Program(Path({str(made.package("vision_encoder"))!r}))({{"pixel_values": np.load(folder / "pixels.npy")}})
np.save(folder / "tokens.npy", tokens["visual_tokens"])
assert "coremltools" not in sys.modules  # 7 s and 700 MB with torch
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), made.runtime().encode_image(pixels))


def test_conversion_is_quiet(coreml_export: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = coreml_export("fp16")
    capfd.readouterr()
    one_graph(made.vlm, CoreMlVision, tmp_path / "vision.mlpackage")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UsageError, match="'coremltools' is not installed; run: pip install 'alignkd\\[coreml\\]'"):
        export_coreml(request(random_vlm(), "int4", tmp_path))
    assert "coremltools is not installed" in str(coreml_interpreter.available())
    assert not any(tmp_path.iterdir())


# --- Core ML itself, against a stand-in for coremltools' MLModel ---


class FakeModel:
    """Records what Core ML would be handed, and answers with zeros of the graph's dtype."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.calls: list[tuple[dict[str, np.ndarray], Any]] = []
        self.states = 0

    def make_state(self) -> str:
        self.states += 1
        return f"state {self.states}"

    def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        self.calls.append((data, state))
        output = self.graph.outputs[0]
        shape = [data[self.graph.inputs[0].name].shape[1] if size is None else size for size in output.shape]
        return {output.name: np.zeros(shape, output.dtype)}


def test_core_ml_gets_the_inputs_of_the_manifest(coreml_export: Exports) -> None:
    made = coreml_export("int4")
    models = {name: FakeModel(graph) for name, graph in made.written.graphs.items()}
    runtime = CoreMlRuntime(made.manifest, {name: {None: model} for name, model in models.items()})
    tokens = runtime.encode_image(np.zeros((1, 3, 96, 96), np.float32))
    rows = runtime.embed(np.array([[1, 2, 3]]))
    assert (tokens.shape, tokens.dtype, rows.shape, rows.dtype) == ((1, 9, 64), np.float32, (1, 3, 64), np.float32)
    assert runtime.decode(rows).shape == (48,)
    runtime.decode(rows[:, :1])
    assert runtime.position == 4
    runtime.reset()
    runtime.decode(rows[:, :2])
    assert runtime.position == 2

    ((pixels, no_state),) = models["vision_encoder"].calls
    assert pixels["pixel_values"].dtype == np.float16 and no_state is None
    assert models["token_embedding"].calls[0][0]["input_ids"].dtype == np.int32
    prefill, step, again = models["text_decoder"].calls
    assert [state for _, state in (prefill, step, again)] == ["state 1", "state 1", "state 2"]
    assert {name: (value.shape, value.dtype) for name, value in prefill[0].items()} == {
        "inputs_embeds": ((1, 3, 64), np.float16),
        "causal_mask": ((1, 1, 3, 3), np.float16),
    }
    np.testing.assert_array_equal(prefill[0]["causal_mask"][0, 0] < 0, [[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert step[0]["causal_mask"].shape == (1, 1, 1, 4) and not step[0]["causal_mask"].any()
    with pytest.raises(UsageError, match=f"do not fit the context of {CONTEXT}"):
        runtime.decode(np.zeros((1, CONTEXT, 64), np.float32))


def test_core_ml_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert coreml.available() == "needs macOS"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.5", ("", "", ""), ""))
    assert coreml.available() == "needs macOS 15 or later, this is 14.5"
    monkeypatch.setattr("platform.mac_ver", lambda: ("26.1", ("", "", ""), ""))
    assert coreml.available() is None
