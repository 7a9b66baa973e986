"""model.pte on ExecuTorch's runtime, and in its own multimodal runner, against torch with the weights of the file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from bundle.errors import UsageError
from bundle.manifest import Precision
from bundle.replay import relative_error
from bundle.runtimes import executorch as engine
from bundle.runtimes.contract import Runtime
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from export.contract import ExportedGraphs, ExportRequest
from export.executorch.modules import TextDecoder, VisionEncoder
from export.executorch.quantize import QuantizedAgain, WeightSource, empty_twin, fill
from export.executorch.stored import Stored
from export.executorch.to_executorch import export_executorch
from export.job.meter import Meter
from export.model.shape import model_shape
from export.weights.plan import StoragePlan
from tests.export.conftest import STUDENT
from tests.export.models import random_vlm
from tests.export.stock_runner import pieces_of, stock_answer

TOKENIZER = STUDENT / "tokenizer.model"
VOCABULARY, CONTEXT, PIXELS, VISUAL_TOKENS = 512, 48, 112, 9
ODD_MODELS = {
    "grouped_query": {},
    "one_kv_head": {"heads": 3, "kv_heads": 1, "hidden": 96},
    "odd_patch_grid_and_gelu": {"patch": 13},
}


def tiny_vlm() -> MobileVlm:
    """One decoder layer with grouped queries and a width of 80, one tower layer that is read, a 7x7 patch grid."""
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=80,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=96,
        num_hidden_layers=2,
        image_size=PIXELS,
        patch_size=16,
    )
    vlm = MobileVlm(MobileVlmConfig(text, vision)).eval()
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    return vlm


@dataclass(frozen=True)
class Exported:
    """A .pte, what the exporter said of it, the model exported, and the same with the weights that the file holds."""

    folder: Path
    graphs: ExportedGraphs
    source: MobileVlm
    stored: MobileVlm

    @contextmanager
    def opened(self, threads: int | None = None) -> Iterator[Runtime]:
        manifest: Any = SimpleNamespace(model=model_shape(self.source, CONTEXT), graphs=self.graphs.graphs)
        with closing(engine.open_runtime(self.folder, manifest, threads)) as runtime:
            yield runtime

    @property
    def pte(self) -> Path:
        return self.folder / "model.pte"


def request_of(vlm: MobileVlm, precision: Precision, folder: Path) -> ExportRequest:
    return ExportRequest(vlm, precision, CONTEXT, TOKENIZER, (2, 5), 1, folder, lambda line: None)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Exported]:
    """The tiny model at a precision, exported once a session."""
    done: dict[Precision, Exported] = {}

    def exported(precision: Precision) -> Exported:
        if precision not in done:
            folder, source, stored = tmp_path_factory.mktemp(precision), tiny_vlm(), tiny_vlm()
            graphs = export_executorch(request_of(source, precision, folder))
            stored.load_state_dict(stored.state_dict() | dict(graphs.dequantized))
            done[precision] = Exported(folder, graphs, source, stored)
        return done[precision]

    return exported


@pytest.fixture
def fp32(export: Callable[[Precision], Exported]) -> Exported:
    return export("fp32")


@pytest.fixture
def int4(export: Callable[[Precision], Exported]) -> Exported:
    return export("int4")


def filled(vlm: MobileVlm, precision: Precision) -> tuple[MobileVlm, dict[str, Stored], WeightSource]:
    """The modules that are traced, for all graphs at once, and what they hold."""
    source = WeightSource(vlm.state_dict(), StoragePlan("executorch", precision), Meter("", 1, lambda line: None))
    twin, stored = empty_twin(vlm), {}
    for graph in ("vision_encoder", "token_embedding", "text_decoder"):
        stored |= fill(twin, graph, source)
    return twin, stored, source


def pixels_of(size: int = PIXELS) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(vlm: MobileVlm, rows: torch.Tensor) -> np.ndarray:
    """Embeddings [1, L, D] -> logits [L, V]."""
    return vlm.lm_head(vlm.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state)[0].numpy()


@torch.no_grad()
def prompt_of(vlm: MobileVlm, ids: list[int]) -> torch.Tensor:
    """Four text rows, an image, the other text rows: [1, L, D]."""
    text, visual = vlm.get_input_embeddings()(torch.tensor([ids])), vlm.encode_images(pixels_of())
    return torch.cat([text[:, :4], visual, text[:, 4:]], 1)


def worst_error(exported: Exported) -> dict[str, float]:
    """Relative error per stage: every stage is fed torch's output of the one before it."""
    ids, vlm = [1, 40, 7, 300, 9, 21, 22, 23], exported.stored
    rows = prompt_of(vlm, ids)
    wanted = logits_of(vlm, rows)
    with torch.no_grad(), exported.opened() as runtime:
        visual = runtime.encode_image(pixels_of().numpy())
        found = {"visual": relative_error(visual, vlm.encode_images(pixels_of()).numpy())}
        embeddings = runtime.embed(np.array([ids]))
        found["embeddings"] = relative_error(embeddings, vlm.get_input_embeddings()(torch.tensor([ids])).numpy())
        found["logits"] = 0.0
        for start, end in [(0, 3), (3, 13), (13, 14), (14, 15), (15, 16), (16, 17)]:
            logits = runtime.decode(rows[:, start:end].numpy())
            found["logits"] = max(found["logits"], relative_error(logits, wanted[end - 1]))
            runtime.embed(np.array([ids]))  # what lies between two decoder calls must leave its K and V alone
            runtime.encode_image(pixels_of().numpy())
        assert runtime.position == 17
    return found


@pytest.mark.parametrize("shape", ODD_MODELS.values(), ids=ODD_MODELS.keys())
@torch.no_grad()
def test_export_modules_compute_what_the_model_computes(shape: dict[str, int]) -> None:
    engine._engine()  # registers the custom operators
    vlm = random_vlm(**shape)
    twin, _, _ = filled(vlm, "fp32")
    visual = vlm.encode_images(pixels_of(96))
    assert relative_error(VisionEncoder(twin)(pixels_of(96)).numpy(), visual.numpy()) < 1e-5
    rows = torch.cat([vlm.get_input_embeddings()(torch.tensor([[1, 40, 7, 23, 9]])), visual], 1)
    wanted, decoder = logits_of(vlm, rows), TextDecoder(twin, CONTEXT)
    for start, end in [(0, 5), (5, 12), (12, 13), (13, 14)]:
        logits = decoder(rows[:, start:end], torch.tensor([start]))[0]
        assert relative_error(logits.numpy(), wanted[end - 1]) < 1e-5


def test_pte_in_float_equals_torch(fp32: Exported) -> None:
    errors = worst_error(fp32)
    assert max(errors.values()) < 1e-5, errors
    assert dict(fp32.graphs.dequantized) == {}


def test_pte_in_int4_equals_torch_with_the_weights_it_holds(int4: Exported) -> None:
    errors = worst_error(int4)
    assert errors["embeddings"] < 1e-6  # nothing but a table
    assert max(errors["visual"], errors["logits"]) < 0.03, errors  # activations are rounded to int8, measured 0.01
    rows = prompt_of(int4.source, [1, 40, 7, 300, 9])
    quantization = relative_error(logits_of(int4.stored, rows)[-1], logits_of(int4.source, rows)[-1])
    assert quantization > 2 * errors["logits"]  # or the check above would pass for the float weights too


@pytest.mark.slow
@pytest.mark.parametrize("precision,limit", [("int8", 0.03), ("fp16", 2e-3)])
def test_pte_in_int8_and_fp16(precision: Precision, limit: float, export: Callable[[Precision], Exported]) -> None:
    exported = export(precision)
    errors = worst_error(exported)
    assert max(errors.values()) < limit, errors
    assert export("int4").pte.stat().st_size < exported.pte.stat().st_size < export("fp32").pte.stat().st_size


def test_int4_file_shrinks_by_what_its_weights_shrink(fp32: Exported, int4: Exported) -> None:
    saved = fp32.pte.stat().st_size - int4.pte.stat().st_size
    expected = 0.0
    weights = {name: weight.numel() for name, weight in int4.graphs.dequantized.items()}
    four_bit = {name for name in weights if name.startswith("language_model.layers") and "down" not in name}
    for name, count in weights.items():
        expected += count * (4 - (0.5 + 2 / 32 if name in four_bit else 1.0))
    assert expected * 0.8 < saved < expected
    assert int4.pte.stat().st_size < 0.5 * fp32.pte.stat().st_size


def test_the_model_is_left_as_it_was(int4: Exported) -> None:
    untouched = tiny_vlm().state_dict()
    assert int4.source.state_dict().keys() == untouched.keys()
    for name, weight in int4.source.state_dict().items():
        assert torch.equal(weight, untouched[name]), name


def test_quantization_is_recorded_graph_by_graph(int4: Exported, fp32: Exported) -> None:
    record = int4.graphs.quantization
    assert record["text_decoder"].group_size == 32
    assert record["text_decoder"].weights == "int4 symmetric, lm_head int8; 1 int8 (width not a multiple of 32)"
    assert record["text_decoder"].activations == "int8 dynamic per token"
    assert (record["vision_encoder"].weights, record["vision_encoder"].group_size) == ("int8 symmetric", None)
    assert (record["token_embedding"].weights, record["token_embedding"].activations) == ("int8 symmetric", "float32")
    assert {entry.weights for entry in fp32.graphs.quantization.values()} == {"float32"}


@pytest.mark.parametrize("precision,levels", [("int4", 16), ("int8", 256)])
def test_dequantized_weights_lie_on_the_grid_of_their_precision(precision: Precision, levels: int) -> None:
    engine._engine()
    vlm = random_vlm()
    _, records, source = filled(vlm, precision)
    stored = dict(QuantizedAgain(source, records))
    linears = [n for n, m in vlm.named_modules() if isinstance(m, torch.nn.Linear) and "encoder.layers.2" not in n]
    assert set(stored) == {f"{name}.weight" for name in [*linears, "language_model.embed_tokens"]}
    weight, original = (
        stored["language_model.layers.1.mlp.up_proj.weight"],
        vlm.language_model.layers[1].mlp.up_proj.weight,
    )
    for group, wanted in zip(weight.reshape(-1, 32), original.reshape(-1, 32), strict=True):
        values = group.unique()
        step = values.diff().min()
        assert len(values) <= levels
        if precision == "int4":
            assert torch.allclose((values / step).round() * step, values, atol=1e-5)
            assert (group - wanted).abs().max() <= 1.01 * step  # the largest may be clipped by one step


def test_fp16_weights_are_the_nearest_halves() -> None:
    vlm = random_vlm()
    _, records, source = filled(vlm, "fp16")
    stored = dict(QuantizedAgain(source, records))
    for name in ("lm_head.weight", "vision_tower.encoder.layers.0.mlp.fc1.bias", "language_model.embed_tokens.weight"):
        assert torch.equal(stored[name], vlm.state_dict()[name].half().float())
    assert "projector.position.weight" not in stored  # convolutions stay float32


def test_methods_and_constants_of_the_multimodal_runner(int4: Exported) -> None:
    module = engine._engine()._load_for_executorch(str(int4.pte))
    wanted = {
        "get_max_seq_len": CONTEXT - 1,
        "get_max_context_len": CONTEXT,
        "get_vocab_size": VOCABULARY,
        "get_bos_id": 1,
        "get_n_layers": 1,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    names = {*wanted, "get_eos_ids", "vision_encoder", "token_embedding", "text_decoder"}
    assert set(module.method_names()) == names
    assert {name: module.run_method(name, ())[0] for name in wanted} == wanted
    assert module.run_method("get_eos_ids", ()) == [2, 5]
    for name, graph in int4.graphs.graphs.items():
        assert (graph.path, graph.method) == ("model.pte", name)
        assert module.method_meta(name).num_inputs() == len(graph.inputs)
    states = int4.graphs.graphs["text_decoder"].states
    assert [(state.name, state.shape) for state in states] == [
        ("layers.0.k_cache", (1, CONTEXT, 1, 32)),
        ("layers.0.v_cache", (1, CONTEXT, 1, 32)),
    ]


def test_reset_empties_the_cache(fp32: Exported) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 1, 20, 64)).astype(np.float32)
    with fp32.opened() as fresh:
        wanted = fresh.decode(second[:, :6]), fresh.decode(second[:, 6:7])
    with fp32.opened() as runtime:
        runtime.decode(first)
        runtime.reset()
        assert runtime.position == 0
        assert np.array_equal(runtime.decode(second[:, :6]), wanted[0])
        assert np.array_equal(runtime.decode(second[:, 6:7]), wanted[1])


def test_the_context_can_be_filled_and_not_overrun(fp32: Exported) -> None:
    rows = np.random.default_rng(0).normal(size=(1, CONTEXT, 64)).astype(np.float32)
    with fp32.opened() as runtime:
        whole = runtime.decode(rows)
        assert runtime.position == CONTEXT
        assert relative_error(whole, logits_of(fp32.stored, torch.from_numpy(rows))[-1]) < 1e-5
        with pytest.raises(
            UsageError, match=rf"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}; .*--context-length"
        ):
            runtime.decode(rows[:, :1])
        assert runtime.position == CONTEXT


def test_one_thread_pool_for_all_open_bundles(fp32: Exported) -> None:
    rows = np.ones((1, 5, 64), np.float32)
    with fp32.opened(threads=2) as two:
        many = two.decode(rows)
        with (
            pytest.raises(UsageError, match="threads is 1, but an executorch bundle is open in this process with 2"),
            fp32.opened(1),
        ):
            pass
        with fp32.opened(threads=2) as same:
            assert np.array_equal(same.decode(rows), many)
    with fp32.opened(threads=1) as one:
        assert relative_error(one.decode(rows), many) < 1e-5
    with pytest.raises(UsageError, match="threads is 0; it must be at least 1"), fp32.opened(threads=0):
        pass


def test_a_file_that_is_no_program(fp32: Exported, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"no program" * 1000)
    broken = Exported(tmp_path, fp32.graphs, fp32.source, fp32.stored)
    with (
        pytest.raises(UsageError, match=r"executorch refuses .*model\.pte: .*; export the bundle again"),
        broken.opened(),
    ):
        pass


@pytest.mark.parametrize("package", ["torchao", "executorch.extension.llm.custom_ops.custom_ops"])
def test_export_names_the_missing_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    wanted = f"the package '{package.split('.')[0]}' is not installed; run: pip install 'alignkd[executorch]'"
    with pytest.raises(UsageError, match=f"^{wanted.replace('[', chr(92) + '[')}$"):
        export_executorch(request_of(random_vlm(), "int4", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_runtime_names_the_missing_extra(fp32: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.available() is None
    monkeypatch.setitem(sys.modules, engine.ENGINE, None)
    with pytest.raises(UsageError, match="'executorch' is not installed; run: pip install"), fp32.opened():
        pass
    monkeypatch.setitem(sys.modules, "executorch", None)
    assert engine.available() == "executorch is not installed; run: pip install 'alignkd[executorch]'"


def test_executorchs_own_runner_gives_the_same_tokens(int4: Exported, tmp_path: Path) -> None:
    before, after, new_tokens = [1, 40, 7, 300], [9, 21, 22, 23], 12
    answered = stock_answer(int4.pte, TOKENIZER, pixels_of(), before, after, new_tokens, tmp_path)
    with int4.opened() as runtime:
        text = runtime.embed(np.array([before + after]))
        visual = runtime.encode_image(pixels_of().numpy())
        logits = runtime.decode(np.concatenate([text[:, :4], visual, text[:, 4:]], 1))
        ids = []
        for _ in range(new_tokens):
            ids.append(int(logits.argmax()))
            logits = runtime.decode(runtime.embed(np.array([ids[-1:]])))
    assert len(set(ids)) > 3  # a runner that says one token for ever proves nothing
    assert not {1, 2, 5} & set(ids)  # BOS and EOS have no text
    assert answered == pieces_of(TOKENIZER, ids)
