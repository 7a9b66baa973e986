"""Core ML packages for the Neural Engine: what they compute, how they are stored, which rules they keep."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bundle.errors import UsageError, VerificationError
from bundle.manifest import CoreMl, Manifest
from bundle.replay import relative_error
from bundle.runtimes.coreml import CoreMlRuntime
from bundle.runtimes.coreml_inputs import causal_mask, decoder_calls, rope
from bundle.runtimes.coreml_interpreter import CoreMlInterpreter
from bundle.runtimes.mil_graph import block_of, blocks_of
from bundle.runtimes.mil_program import Rounding, open_programs
from bundle.runtimes.mil_proto import DATA_FOLDER, MODEL_FILE, read_spec, weight_path
from distill.models.checkpoint import load_vlm
from distill.models.mobilevlm import MobileVlm
from export.contract import CoreMlOptions, ExportedGraphs, ExportRequest
from export.coreml.ane_checks import check_engine_rules
from export.coreml.ane_modules import AneDecoder, AneVision, head_parts
from export.coreml.convert import load_coremltools
from export.coreml.to_coreml import export_coreml
from export.coreml.weights import Package
from export.model.shape import model_shape
from tests.export.conftest import STUDENT, Command
from tests.export.hf_checkpoints import KINDS, write_checkpoint
from tests.export.models import random_vlm
from tests.export.test_coreml import torch_logits

CONTEXT = 72  # the cache is 96 rows, a multiple of 32
LAYER = "language_model_layers_1"


@dataclass(frozen=True)
class Export:
    """One model as packages for the Neural Engine."""

    vlm: MobileVlm
    twin: MobileVlm  # with the weights that the packages hold
    folder: Path
    written: ExportedGraphs

    @property
    def manifest(self) -> Manifest:
        """As much of a manifest as a runtime reads."""
        return SimpleNamespace(  # type: ignore[return-value]
            model=model_shape(self.vlm, CONTEXT), graphs=self.written.graphs, coreml=self.written.coreml
        )

    @property
    def decoder(self) -> Path:
        return self.folder / self.written.graphs["text_decoder"].path


def request(vlm: MobileVlm, folder: Path) -> ExportRequest:
    return ExportRequest(
        vlm,
        "int4",
        CONTEXT,
        Path("tokenizer.model"),
        (2,),
        1,
        folder,
        lambda line: None,
        coreml=CoreMlOptions("ane"),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A small model with shared key-value heads and a down_proj that 32 does not divide; read it, never change it."""
    folder, vlm = tmp_path_factory.mktemp("ane"), random_vlm(feed_forward=80)
    before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
    written = export_coreml(request(vlm, folder))
    assert all(torch.equal(weight, before[name]) for name, weight in vlm.state_dict().items())
    twin = MobileVlm(vlm.config).eval()
    twin.load_state_dict(before | dict(written.dequantized))
    return Export(vlm, twin, folder, written)


# --- what they compute ---


@pytest.mark.parametrize("rounding,tolerance", [("float32", 2e-3), ("float16", 1e-2)])
def test_every_stage_equals_torch(rounding: Rounding, tolerance: float, made: Export) -> None:
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 40, 7, 23, 9]])
    with torch.no_grad():
        visual, embeddings = made.twin.encode_images(pixels), made.twin.get_input_embeddings()(ids)
    rows = torch.cat([embeddings, visual] * 5, 1)  # [1, 70, D]
    wanted = torch_logits(made.twin, rows)
    runtime = CoreMlInterpreter(made.folder, made.manifest, rounding)
    assert relative_error(runtime.encode_image(pixels.numpy()), visual.numpy()) < tolerance
    np.testing.assert_array_equal(runtime.embed(ids.numpy()), embeddings.numpy())
    # more than a call takes, a padded call, single rows
    for start, end in [(0, 66), (66, 68), (68, 69), (69, 70)]:
        logits = runtime.decode(rows[:, start:end].numpy())
        assert relative_error(logits, wanted[end - 1]) < tolerance
    assert runtime.position == 70


def test_a_full_context_is_usable_and_one_more_is_refused(made: Export) -> None:
    runtime = CoreMlInterpreter(made.folder, made.manifest)
    rows = torch.randn(1, CONTEXT, 64, generator=torch.Generator().manual_seed(1))
    last = runtime.decode(rows.numpy())
    assert relative_error(last, torch_logits(made.twin, rows)[-1]) < 2e-3
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        runtime.decode(rows[:, :1].numpy())


def test_calls_stay_inside_the_cache(made: Export) -> None:
    rows = np.zeros((1, 40, 64), np.float32)
    calls = list(decoder_calls(20, rows, made.manifest))
    assert [call.function for call in calls] == ["prefill"]  # 20 and 64 rows are no more than 96
    calls = list(decoder_calls(33, rows[:, :3], made.manifest))
    assert [(call.function, int(call.inputs["position"][0])) for call in calls] == [
        ("decode", 33),
        ("decode", 34),
        ("decode", 35),
    ]


def test_inputs_say_where_rows_stand(made: Export) -> None:
    (call,) = decoder_calls(5, np.ones((1, 3, 64), np.float32), made.manifest)
    assert {name: value.shape for name, value in call.inputs.items()} == {
        "inputs_embeds": (1, 64, 64),
        "position": (1,),
        "cos": (1, 1, 64, 32),
        "sin": (1, 1, 64, 32),
        "causal_mask": (1, 1, 64, 96),
        "last_row": (1, 1, 1, 64),
    }
    np.testing.assert_array_equal(call.inputs["causal_mask"][..., :3, :8], causal_mask(5, 3))
    assert (call.inputs["causal_mask"][..., :3, 8:] < 0).all()
    assert call.inputs["last_row"].reshape(-1).nonzero()[0].tolist() == [2]
    assert not call.inputs["inputs_embeds"][:, 3:].any()


def test_angles_are_the_models_own() -> None:
    vlm = random_vlm()
    wanted = vlm.language_model.rotary_emb(torch.zeros(1), torch.arange(7, 12)[None])
    for found, table in zip(rope(7, 5, 32, 500.0), wanted, strict=True):
        np.testing.assert_allclose(found[0, 0], table[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (3, 1), (4, 2)])
def test_decoder_module_equals_the_model(heads: int, kv_heads: int) -> None:
    vlm = random_vlm(hidden=96, heads=heads, kv_heads=kv_heads)
    module, rows = AneDecoder(vlm, 32, 8), torch.randn(1, 11, 96, generator=torch.Generator().manual_seed(4))
    wanted = torch_logits(vlm, rows)
    shape, notes = model_shape(vlm, 32), CoreMl(engine="ane", functions={"p": 8, "d": 1}, rope_theta=500.0)
    state = SimpleNamespace(shape=tuple(module.k_cache.shape))
    manifest: Any = SimpleNamespace(model=shape, coreml=notes, graphs={"text_decoder": SimpleNamespace(states=[state])})
    for start, end in [(0, 8), (8, 11)]:
        (call,) = decoder_calls(start, rows[:, start:end].numpy(), manifest)
        with torch.no_grad():
            logits = module(*map(torch.from_numpy, call.inputs.values()))
        assert relative_error(logits[0, 0].numpy(), wanted[end - 1]) < 1e-5


@pytest.mark.parametrize("patch", [16, 13])
def test_vision_module_equals_the_model(patch: int) -> None:
    vlm = random_vlm(patch=patch)
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert relative_error(AneVision(vlm)(pixels).numpy(), vlm.encode_images(pixels).numpy()) < 1e-5


@pytest.mark.parametrize("text,tower", KINDS)
def test_modules_of_the_llava_family_equal_the_model(text: str, tower: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, text, tower)
    vlm = load_vlm(tmp_path)
    shape, size = model_shape(vlm, 32), vlm.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    rows = torch.randn(1, 8, shape.hidden_size, generator=torch.Generator().manual_seed(6))
    cos, sin = vlm.language_model.rotary_emb(torch.zeros(1), torch.arange(8)[None])
    mask = torch.nn.functional.pad(torch.from_numpy(causal_mask(0, 8)), (0, 24), value=-1e4)
    last = torch.nn.functional.one_hot(torch.tensor([[[7]]]), 8).float()
    inputs = (rows, torch.tensor([0], dtype=torch.int32), cos[None], sin[None], mask, last)
    with torch.no_grad():
        assert relative_error(AneVision(vlm)(pixels).numpy(), vlm.encode_images(pixels).numpy()) < 1e-5
        logits = AneDecoder(vlm, 32, 8)(*inputs)
    assert relative_error(logits[0, 0].numpy(), torch_logits(vlm, rows)[-1]) < 1e-5


# --- how they are stored ---


def test_weights_are_stored_as_the_engine_wants(made: Export) -> None:
    decoder = Package(made.decoder)
    stored = {name: decoder[name].bits for name in decoder}
    four = {f"{LAYER}_self_attn_{part}_proj_weight" for part in "qkvo"} | {f"{LAYER}_mlp_up_proj_weight"}
    assert {stored[name] for name in four} == {4}
    assert all(decoder.table_of(name) is not None for name in four)
    assert stored[f"{LAYER}_mlp_down_proj_weight"] == stored["lm_head_part_0_weight"] == 8
    assert not any("cos" in name or "sin" in name for name in stored), "angles are inputs"
    (table,) = {len(decoder.table_of(name)) for name in four if "k_proj" in name}  # type: ignore[arg-type]
    assert table == 64 // 16, "16 rows share a table"
    quantization = made.written.quantization
    assert quantization["text_decoder"].weights == (
        "4-bit tables, one for 16 rows, down_proj and lm_head int8 symmetric per channel"
    )
    assert quantization["vision_encoder"].weights == "int8 symmetric"


def test_functions_share_their_weights(made: Export) -> None:
    spec = read_spec(made.decoder)
    places = [
        {
            operation.outputs[0].name: operation.inputs["indices"].arguments[0].value.blobFileValue.offset
            for operation in block.operations
            if operation.type == "constexpr_lut_to_dense"
        }
        for block in blocks_of(spec)
    ]
    assert len(places) == 2 and places[0] == places[1] and len(places[0]) == 12
    programs = open_programs(made.decoder, ("prefill", "decode"))
    shared = [
        {id(value) for value in program._environment if isinstance(value, np.ndarray) and value.size > 1000}
        for program in programs.values()
    ]
    assert shared[0] == shared[1] and shared[0], "the evaluator holds each once too"


def test_the_description_is_what_coremltools_makes_of_two_functions(made: Export, tmp_path: Path) -> None:
    ct = load_coremltools()
    for name in ("prefill", "decode"):
        spec = read_spec(made.decoder)
        model = type(spec)()
        model.specificationVersion = spec.specificationVersion
        (described,) = (one for one in spec.description.functions if one.name == name)
        for part in ("input", "output", "state"):
            getattr(model.description, part).extend(getattr(described, part))
        model.mlProgram.version = spec.mlProgram.version
        model.mlProgram.functions["main"].CopyFrom(spec.mlProgram.functions[name])
        shutil.copytree(made.decoder, tmp_path / f"{name}.mlpackage")
        (tmp_path / f"{name}.mlpackage" / DATA_FOLDER / MODEL_FILE).write_bytes(model.SerializeToString())
    both = ct.utils.MultiFunctionDescriptor()
    for name in ("prefill", "decode"):
        both.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    both.default_function_name = "decode"
    ct.utils.save_multifunction(both, str(tmp_path / "both.mlpackage"))
    theirs, ours = read_spec(tmp_path / "both.mlpackage"), read_spec(made.decoder)
    theirs.description.ClearField("metadata")
    assert ours.description == theirs.description
    assert weight_path(made.decoder).stat().st_size <= weight_path(tmp_path / "both.mlpackage").stat().st_size


# --- the rules ---


def broken(made: Export, change: Callable[[Any], None]) -> str:
    """What the check says of the decode function after a change."""
    block = block_of(read_spec(made.decoder), "decode")
    change(block)
    with pytest.raises(VerificationError) as refused:
        check_engine_rules(made.decoder, "decode", block, made.written.graphs["text_decoder"])
    return str(refused.value)


def first(block: Any, kind: str) -> Any:
    return next(operation for operation in block.operations if operation.type == kind)


def tensor_of(block: Any, kind: str) -> Any:
    return first(block, kind).outputs[0].type.tensorType


def add_axes(tensor: Any) -> None:
    for _ in range(2):
        tensor.dimensions.add().constant.size = 1


RULES: dict[str, tuple[Callable[[Any], None], str]] = {
    "silu": (lambda b: setattr(first(b, "sigmoid"), "type", "silu"), "operation 'silu' is not the engine's"),
    "float32": (lambda b: setattr(tensor_of(b, "conv"), "dataType", 11), "is float32"),
    "dynamic": (lambda b: tensor_of(b, "conv").dimensions[3].unknown.SetInParent(), r"has a dynamic size: \[.*None\]"),
    "axes": (lambda b: add_axes(tensor_of(b, "conv")), "has 6 axes, more than 5"),
    "alignment": (
        lambda b: setattr(tensor_of(b, "softmax").dimensions[3].constant, "size", 90),
        "of an attention has a last axis of 90, no multiple of 32",
    ),
    "channels": (
        lambda b: setattr(tensor_of(b, "conv").dimensions[1].constant, "size", 32000),
        "has 32000 channels, more than 16384",
    ),
}


@pytest.mark.parametrize("change,message", RULES.values(), ids=RULES.keys())
def test_a_broken_rule_is_named(change: Callable[[Any], None], message: str, made: Export) -> None:
    said = broken(made, change)
    assert "text_decoder.mlpackage: function 'decode' breaks a rule of the Neural Engine" in said
    assert re.search(message, said), said


def test_a_state_of_odd_size_is_named(made: Export) -> None:
    graph = made.written.graphs["text_decoder"]
    states = tuple(state.model_copy(update={"shape": (2, 2, 90, 32)}) for state in graph.states)
    with pytest.raises(VerificationError, match="state 'k_cache' has size 90, no multiple of 32"):
        check_engine_rules(
            made.decoder,
            "decode",
            block_of(read_spec(made.decoder), "decode"),
            graph.model_copy(update={"states": states}),
        )


def test_a_large_head_is_cut_into_equal_parts() -> None:
    assert head_parts(32000) == {"part_0": (0, 16000), "part_1": (16000, 32000)}
    assert head_parts(512) == {"part_0": (0, 512)}
    parts = list(head_parts(151_647).values())
    assert parts[0][0] == 0 and parts[-1][1] == 151_647
    assert all(end == start for (_, end), (start, _) in zip(parts, parts[1:], strict=False))
    assert all(0 < end - start <= 16384 for start, end in parts)


def test_what_the_engine_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="heads are 16 wide .* multiples of 32; use --engine gpu"):
        export_coreml(request(random_vlm(head_dim=16), tmp_path))
    vlm = random_vlm()
    vlm.config.text_config.hidden_act = "gelu"
    with pytest.raises(UsageError, match="activation 'gelu' of the decoder is not supported; supported: silu"):
        export_coreml(request(vlm, tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--target", "onnx", "--int4"), "--engine is for --target coreml, not --target onnx; leave it out"),
        (("--target", "coreml", "--fp32"), "--engine ane computes in float16 and not at --fp32; use --fp16"),
        (("--target", "coreml", "--int4"), "--engine ane: the decoder's heads are 16 wide"),
    ],
)
def test_a_wrong_engine_is_one_line(
    arguments: tuple[str, ...], message: str, run_export: Command, tmp_path: Path
) -> None:
    ran = run_export(STUDENT, *arguments, "--engine", "ane", "--output", tmp_path / "out")
    assert ran.code == 2 and message in ran.error and list(tmp_path.iterdir()) == []


# --- Core ML itself, against a stand-in for coremltools' MLModel ---


class FakeModel:
    """Records what one function is handed, and answers with zeros."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.calls, self.states = shape, [], 0  # type: ignore[var-annotated]

    def make_state(self) -> str:
        self.states += 1
        return f"state {self.states}"

    def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        self.calls.append((data, state))
        return {name: np.zeros(self.shape, np.float16) for name in ("logits", "embeddings", "visual_tokens")}


def test_core_ml_gets_static_inputs_and_one_state(made: Export) -> None:
    decoder = {name: FakeModel((1, 1, 48)) for name in ("prefill", "decode")}
    embedding = {"prefill": FakeModel((1, 64, 64)), "decode": FakeModel((1, 1, 64))}
    models: Any = {
        "vision_encoder": {None: FakeModel((1, 9, 64))},
        "token_embedding": embedding,
        "text_decoder": decoder,
    }
    runtime = CoreMlRuntime(made.manifest, models)
    assert "Neural Engine" in runtime.covers
    rows = runtime.embed(np.array([[1, 2, 3]]))
    assert rows.shape == (1, 3, 64) and embedding["prefill"].calls[0][0]["input_ids"].shape == (1, 64)
    runtime.decode(rows)
    runtime.decode(rows[:, :1])
    ((prefill, state),), ((step, same),) = decoder["prefill"].calls, decoder["decode"].calls
    assert state == same, "both functions write one cache"
    assert prefill["inputs_embeds"].shape == (1, 64, 64) and step["inputs_embeds"].shape == (1, 1, 64)
    assert {name: str(value.dtype) for name, value in step.items() if name != "position"} == {
        name: "float16" for name in ("inputs_embeds", "cos", "sin", "causal_mask", "last_row")
    }
    assert step["position"].dtype == np.int32 and step["position"].tolist() == [3]
