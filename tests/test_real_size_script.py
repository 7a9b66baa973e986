"""scripts/make_real_size_checkpoint.py at tiny width: names, shapes, shards and tokenizer fit each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bundle.errors import UsageError
from distill.models import load_vlm
from distill.models.processing import read_processing


@pytest.fixture
def script(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("make_real_size_checkpoint")
    monkeypatch.setattr(module, "STUDENT", module.DecoderSize(32, 24, 2, 48))
    for name, value in {"TOWER_WIDTH": 32, "TOWER_FEED_FORWARD": 48, "SHARD_BYTES": 3_000_000}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_what_it_writes_loads(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "made"
    assert script.make(script.RealSizeConfig(output, layers=3, vision_layers=2)) == 0
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 1
    vlm = load_vlm(output)
    text = vlm.config.text_config
    assert (text.num_hidden_layers, text.vocab_size, text.max_position_embeddings) == (3, 32000, 2048)
    assert vlm.config.visual_tokens == 144 and vlm.config.tower_layers == 1
    assert read_processing(output).image.size == 336  # checks the tokenizer's 32000 pieces too
    with torch.no_grad():
        logits = vlm.logits(torch.tensor([[1, 400, 9]]))
    assert 0.01 < float(logits.std()) < 10


def test_weights_are_seeded(script: ModuleType) -> None:
    first, again, other = (script.random_weight("lm_head.weight", (64, 64), seed, 3) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float(first.float().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("flag", ["layers", "vision_layers"])
def test_no_layers(script: ModuleType, tmp_path: Path, flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} is 0; it must be at least 1"):
        script.RealSizeConfig(tmp_path / "out", **{flag: 0})
