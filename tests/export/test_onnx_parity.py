"""ONNX files on onnxruntime against the torch model that holds the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bundle.errors import UsageError
from bundle.manifest import Precision
from bundle.replay import relative_error
from bundle.runtimes.contract import Runtime
from bundle.runtimes.onnx import open_runtime
from distill.models.mobilevlm import MobileVlm
from export.contract import ExportRequest
from export.model.shape import model_shape
from export.onnx.to_onnx import export_onnx
from tests.export.conftest import STUDENT
from tests.export.models import random_vlm

CONTEXT = 64
ODD_MODELS = {
    "grouped_query": {},
    "one_kv_head": {"heads": 3, "kv_heads": 1, "hidden": 96},
    "odd_patch_grid": {"patch": 13},
    "width_no_group_divides": {"hidden": 80, "feed_forward": 112},
}


def opened(vlm: MobileVlm, precision: Precision, folder: Path) -> tuple[Runtime, MobileVlm]:
    """Export ``vlm`` -> the runtime on its files, and the model with the weights that the files hold."""
    request = ExportRequest(vlm, precision, CONTEXT, STUDENT / "tokenizer.model", (2,), 1, folder, lambda line: None)
    written = export_onnx(request)
    state = {name: weight.clone() for name, weight in vlm.state_dict().items()} | dict(written.dequantized)
    twin = MobileVlm(vlm.config).eval()
    twin.load_state_dict(state)
    manifest = SimpleNamespace(model=model_shape(vlm, CONTEXT), graphs=written.graphs, prefix_cache=None)
    return open_runtime(folder, manifest, threads=1), twin  # type: ignore[arg-type]


@torch.no_grad()
def torch_logits(vlm: MobileVlm, rows: torch.Tensor) -> np.ndarray:
    """Embeddings [1, L, D] -> logits [L, V]."""
    return vlm.lm_head(vlm.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state)[0].numpy()


@pytest.mark.parametrize("shape", ODD_MODELS.values(), ids=ODD_MODELS.keys())
@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("fp16", 1e-5), ("int8", 5e-2), ("int4", 5e-2)])
def test_every_stage_equals_torch(
    shape: dict[str, int], precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    runtime, twin = opened(random_vlm(**shape), precision, tmp_path)
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 40, 7, 23, 9]])
    with torch.no_grad():
        visual, embeddings = twin.encode_images(pixels), twin.get_input_embeddings()(ids)
    assert relative_error(runtime.encode_image(pixels.numpy()), visual.numpy()) < tolerance
    assert relative_error(runtime.embed(ids.numpy()), embeddings.numpy()) < 1e-6
    rows = torch.cat([embeddings, visual, embeddings], 1)  # [1, 19, D]
    wanted = torch_logits(twin, rows)
    # prefill in two pieces, then token by token
    for start, end in [(0, 5), (5, 15), (15, 16), (16, 17), (17, 18), (18, 19)]:
        logits = runtime.decode(rows[:, start:end].numpy())
        assert relative_error(logits, wanted[end - 1]) < tolerance
    assert runtime.position == 19


def test_the_files_hold_the_weights_that_were_asked_for(tmp_path: Path) -> None:
    vlm = random_vlm(hidden=80, feed_forward=112)  # 80 and 112 are no multiples of 32, the attention's 128 is
    errors = {}
    for precision in ("fp16", "int8", "int4"):
        (tmp_path / precision).mkdir()
        request = ExportRequest(
            vlm, precision, CONTEXT, STUDENT / "tokenizer.model", (2,), 1, tmp_path / precision, lambda line: None
        )
        stored = export_onnx(request).dequantized
        errors[precision] = {
            name: relative_error(weight.numpy(), vlm.state_dict()[name].numpy()) for name, weight in stored.items()
        }
    layer = "language_model.layers.1"
    assert 0 < max(errors["fp16"].values()) < 1e-3
    assert 1e-3 < min(errors["int8"].values()) and max(errors["int8"].values()) < 1e-2
    four_bit = {name for name, error in errors["int4"].items() if error > 3e-2}
    assert four_bit == {f"language_model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}
    assert errors["int4"][f"{layer}.mlp.down_proj.weight"] < 1e-2  # 112 wide: fell back to 8 bits


def test_reset_starts_a_new_sequence(tmp_path: Path) -> None:
    runtime, _ = opened(random_vlm(), "int4", tmp_path)
    rows = np.random.default_rng(0).normal(size=(1, 6, 64)).astype(np.float32)
    first = runtime.decode(rows)
    following = runtime.decode(rows[:, :1])
    runtime.reset()
    assert runtime.position == 0
    np.testing.assert_array_equal(runtime.decode(rows), first)
    np.testing.assert_array_equal(runtime.decode(rows[:, :1]), following)


def test_a_full_context_is_usable_and_one_more_is_refused(tmp_path: Path) -> None:
    runtime, twin = opened(random_vlm(), "fp32", tmp_path)
    rows = torch.randn(1, CONTEXT, 64, generator=torch.Generator().manual_seed(1))
    runtime.decode(rows[:, : CONTEXT - 1].numpy())
    last = runtime.decode(rows[:, CONTEXT - 1 :].numpy())
    assert relative_error(last, torch_logits(twin, rows)[-1]) < 1e-5
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        runtime.decode(rows[:, :1].numpy())
