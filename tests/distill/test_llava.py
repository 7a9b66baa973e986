"""Hugging Face LLaVA checkpoints: the same logits as transformers, every way of naming, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from bundle.errors import UsageError
from distill.models import load_vlm
from distill.models.generation import answers
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import attention_rows, look, tower_hash, unused_tower_parameters
from tests.distill.llava_checkpoints import IMAGE_ID, KINDS, make_llava, write_llava

SIZE = 24


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Right-padded rows: two images in one conversation, none, one."""
    draw = torch.Generator().manual_seed(4)
    rows = [[1, IMAGE_ID, 5, 6, IMAGE_ID, 9, 10, 11, 12], [1, 20, 21, 22], [1, 30, IMAGE_ID, 31, 32]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": torch.randn(3, 3, SIZE, SIZE, generator=draw),
    }


def as_transformers(batch: dict[str, torch.Tensor], visual_tokens: int) -> dict[str, torch.Tensor]:
    """The same with one id per visual token, as its processor writes it."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        kept = ids[mask.bool()].tolist()
        rows.append([i for one in kept for i in ([one] * (visual_tokens if one == IMAGE_ID else 1))])
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"]}


@torch.no_grad()
def difference(theirs: LlavaForConditionalGeneration, ours: MobileVlm, batch: dict[str, torch.Tensor]) -> float:
    spread = as_transformers(batch, ours.config.visual_tokens)
    wanted, got = theirs(**spread).logits, ours.logits(**batch)
    assert wanted.shape == got.shape and wanted.std() > 0.3
    return float((wanted - got)[spread["attention_mask"].bool()].abs().max())


@pytest.mark.parametrize(("text", "tower"), KINDS)
def test_logits_are_those_of_transformers(
    text: str, tower: str, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    theirs = make_llava(text, tower)
    ours = load_vlm(write_llava(tmp_path / "m", theirs))
    assert ours.image_token_id == IMAGE_ID and ours.config.visual_tokens == 9
    assert difference(theirs, ours, batch) < 1e-5
    text_only = {"input_ids": batch["input_ids"][1:2], "attention_mask": None}
    with torch.no_grad():
        wanted = theirs(input_ids=text_only["input_ids"]).logits
        torch.testing.assert_close(ours.logits(**text_only), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tower", "tokens", "changes"), [
    ("clip_vision_model", 10, {"vision_feature_select_strategy": "full"}),
    ("siglip_vision_model", 8, {"vision_feature_select_strategy": "default"}),
    ("siglip_vision_model", 9, {"vision_feature_layer": -1}),
    ("clip_vision_model", 9, {"vision_feature_layer": [-2, 1, 0]}),
    ("siglip_vision_model", 9, {"vision_feature_layer": [3]}),
    ("clip_vision_model", 9, {"multimodal_projector_bias": False, "projector_hidden_act": "relu"}),
])  # fmt: skip
def test_what_is_read_of_the_tower(
    tower: str, tokens: int, changes: dict[str, Any], tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    theirs = make_llava(tower=tower, **changes)
    ours = load_vlm(write_llava(tmp_path / "m", theirs))
    assert ours.config.visual_tokens == tokens
    assert ours.tower_features(batch["pixel_values"]).shape[1:] == ours.config.feature_shape
    assert difference(theirs, ours, batch) < 1e-5


@pytest.mark.parametrize("text_changes", [
    {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 12},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
])  # fmt: skip
def test_decoders_of_other_settings(
    text_changes: dict[str, Any], tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    theirs = make_llava(text_changes=text_changes)
    ours = load_vlm(write_llava(tmp_path / "m", theirs))
    assert difference(theirs, ours, batch) < 1e-5
    assert (ours.lm_head.weight is ours.language_model.embed_tokens.weight) == ("tie_word_embeddings" in text_changes)


@pytest.mark.parametrize(
    "text_changes", [{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}]
)
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_attention_of_any_layer_is_that_of_transformers(
    text: str, text_changes: dict[str, Any], tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    if text == "llama" and text_changes:
        return  # LLaMA has no window
    theirs = make_llava(text, text_changes=text_changes)
    ours = load_vlm(write_llava(tmp_path / "m", theirs))
    assert difference(theirs, ours, batch) < 1e-5
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = theirs(**as_transformers(batch, 9), output_attentions=True).attentions
        seen = look(
            ours, batch["input_ids"], batch["attention_mask"], torch.full_like(batch["input_ids"], -100),
            ours.encode_images(batch["pixel_values"]), every_layer=True,
        )  # fmt: skip
        for layer in range(2):
            rows = torch.arange(20)[None]
            got = attention_rows(ours, seen.layer_inputs[layer], torch.tensor([0]), rows, layer)
            torch.testing.assert_close(got[0], wanted[layer][0, :, :20], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def by_whole_passes(vlm: MobileVlm, ids: torch.Tensor, pixels: torch.Tensor | None, steps: int) -> list[int]:
    """Greedy without a cache: the whole sequence again for every token."""
    said: list[int] = []
    for _ in range(steps):
        row = torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)
        said.append(int(vlm.logits(row, None, pixels)[0, -1].argmax()))
    return said


@pytest.mark.parametrize(("text", "tower"), KINDS)
def test_generation_with_a_cache_one_by_one_and_together(
    text: str, tower: str, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    vlm = load_vlm(write_llava(tmp_path / "m", make_llava(text, tower)))
    images = (slice(0, 2), None, slice(2, 3))
    wanted = []
    for row, mask, image in zip(batch["input_ids"], batch["attention_mask"], images, strict=True):
        ids, pixels = row[mask.bool()][None], None if image is None else batch["pixel_values"][image]
        wanted.append(by_whole_passes(vlm, ids, pixels, 6))
        assert vlm.greedy(ids, pixels, 6) == wanted[-1]
    assert answers(vlm, **batch, max_new_tokens=6) == wanted
    stop = wanted[0][2]
    cut = [said[: said.index(stop) + 1] if stop in said else said for said in wanted]
    assert answers(vlm, **batch, max_new_tokens=6, eos_ids=(stop,)) == cut


def test_every_way_of_naming_is_read(tmp_path: Path, batch: dict[str, torch.Tensor]) -> None:
    theirs = make_llava("qwen2", "clip_vision_model")
    write_llava(tmp_path / "old", theirs)
    write_llava(tmp_path / "new", theirs, save_original_format=False)
    write_llava(tmp_path / "sharded", theirs, max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for name in ("oldest", "middle"):  # with vision_model. inside the tower, as up to transformers 4
        source = "old" if name == "oldest" else "new"
        write_llava(tmp_path / name, theirs)
        weights = load_file(tmp_path / source / "model.safetensors")
        spread = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in weights.items()}
        save_file(spread, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    names = set()
    for name in ("old", "new", "sharded", "oldest", "middle"):
        ours = load_vlm(tmp_path / name)
        names.add(json.dumps(ours.config.llava_names, sort_keys=True))
        assert difference(theirs, ours, batch) < 1e-5
    assert len(names) == 4


def test_bfloat16_on_loading_is_bfloat16_after_loading(tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "m", make_llava("qwen2", text_changes={"tie_word_embeddings": True}))
    half, whole = load_vlm(folder, torch.bfloat16), load_vlm(folder).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), whole.state_dict().values(), strict=True))
    assert half.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert half.lm_head.weight is half.language_model.embed_tokens.weight


def test_siglips_pooling_head_is_never_trained(tmp_path: Path) -> None:
    vlm = load_vlm(write_llava(tmp_path / "m", make_llava("llama", "siglip_vision_model")))
    unused = {id(p) for p in unused_tower_parameters(vlm)}
    vlm.encode_images(torch.randn(1, 3, SIZE, SIZE)).sum().backward()
    for name, parameter in vlm.vision_tower.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in unused), name


def test_towers_that_are_read_differently_have_different_hashes(tmp_path: Path) -> None:
    vlm = load_vlm(write_llava(tmp_path / "m", make_llava()))
    before = tower_hash(vlm)
    vlm.config.vision_select_strategy = "full"
    assert tower_hash(vlm) != before


@pytest.mark.parametrize(("changes", "message"), [
    ({"architectures": ["LlavaNextForConditionalGeneration"]},
     "'LlavaNextForConditionalGeneration' is not supported .it cuts .*: MobileVlm, .*nearest is LlavaForConditional"),
    ({"text_config": {"model_type": "mistral"}}, "model_type 'mistral' is not supported; supported: llama, qwen2"),
    ({"vision_config": {"model_type": "pixtral"}}, "model_type 'pixtral' is not supported; supported: clip_vision"),
    ({"vision_feature_layer": -9}, "describes no model"),
])  # fmt: skip
def test_what_is_not_supported_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "m", make_llava())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError, match=message) as error:
        load_vlm(folder)
    assert "\n" not in str(error.value)


def test_foreign_and_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "m", make_llava())
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"image_newline": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(UsageError, match="'image_newline' is not part of a LlavaForConditionalGeneration"):
        load_vlm(folder)
    del weights["language_model.lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"1 missing \(first: \['lm_head.weight'\]\)"):
        load_vlm(folder)
