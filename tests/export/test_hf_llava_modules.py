"""The modules that ExecuTorch and Core ML are made of, run by torch: the model's own values, whatever its parts.

Lowering takes half a minute of processor time a model; what the lowered graphs compute is in test_hf_llava_targets.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from export.coreai.modules import CoreAiVision
from export.coreml.modules import CoreMlDecoder, CoreMlVision
from export.executorch.modules import TextDecoder, VisionEncoder
from tests.export.hf_checkpoints import KINDS, SIZE, VARIANTS, write_checkpoint

CASES = {f"{text} {tower}": (text, tower, {}) for text, tower in KINDS} | {
    name: case for name, case in VARIANTS.items() if "chat" not in case[2]
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES |= {"yarn": ("qwen2", "clip_vision_model", {"text_changes": {"rope_parameters": YARN}})}
CASES |= {"heads of 24": ("llama", "clip_vision_model", {"text_changes": {"head_dim": 24}})}
CONTEXT, PREFILL = 64, 11


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def vlm(request: pytest.FixtureRequest, tmp_path: Path) -> MobileVlm:
    text, tower, changes = request.param
    write_checkpoint(tmp_path, text, tower, **changes)
    return load_vlm(tmp_path)


def rows_and_logits(vlm: MobileVlm) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [1, T, D] of some ids, and the logits [T, V] behind each."""
    ids = torch.arange(7, 7 + PREFILL + 2)[None]
    return vlm.get_input_embeddings()(ids), vlm.logits(ids)[0]


@torch.no_grad()
def test_vision_encoders(vlm: MobileVlm) -> None:
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    wanted = vlm.encode_images(pixels)
    for module in (VisionEncoder(vlm), CoreMlVision(vlm), CoreAiVision(vlm)):
        torch.testing.assert_close(module(pixels), wanted, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_executorch_decoder_prefills_then_goes_on(vlm: MobileVlm) -> None:
    importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    rows, wanted = rows_and_logits(vlm)
    decoder = TextDecoder(vlm, CONTEXT)
    for start, end in ((0, PREFILL), (PREFILL, PREFILL + 1), (PREFILL + 1, PREFILL + 2)):
        found = decoder(rows[:, start:end], torch.tensor([start]))
        torch.testing.assert_close(found[0], wanted[end - 1], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_coreml_decoder_prefills_then_goes_on(vlm: MobileVlm) -> None:
    rows, wanted = rows_and_logits(vlm)
    decoder: Any = CoreMlDecoder(vlm, CONTEXT)
    for start, end in ((0, PREFILL), (PREFILL, PREFILL + 1), (PREFILL + 1, PREFILL + 2)):
        mask = torch.full((1, 1, end - start, end), -1e4).triu(start + 1)
        torch.testing.assert_close(decoder(rows[:, start:end], mask)[0, 0], wanted[end - 1], atol=2e-4, rtol=2e-4)
