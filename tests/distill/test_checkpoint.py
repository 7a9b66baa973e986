"""Checkpoints: processing of both layouts, the round trip, fresh students, and what is wrong with a bad one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from bundle.errors import UsageError
from bundle.prompt import TEMPLATES, build_prompt
from bundle.tokenizer import open_tokenizer
from distill.models import load_vlm
from distill.models.create import create_student
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.models.save import save_checkpoint


@pytest.fixture
def copied(reference: Path, tmp_path: Path) -> Path:
    """A student and its tower that a test may spoil."""
    for name in ("student", "clip-tiny"):
        shutil.copytree(reference / name, tmp_path / name)
    return tmp_path / "student"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_tokenizer(path: Path, size: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(2000)]
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, vocab_size=size, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip


def test_published_layout_reads_the_processor_beside_the_tower(reference: Path) -> None:
    processing = read_processing(reference / "student")
    assert processing.image.size == 336 and processing.image.strategy == "pad"
    assert processing.image.pad_rgb == (122, 116, 104)
    assert processing.image.mean == (0.48145466, 0.4578275, 0.40821073)
    assert processing.prompt == TEMPLATES["v1"]
    spec = processing.tokenizer
    assert (spec.bos_id, spec.eos_ids, spec.pad_id, spec.image_token_id) == (1, (2,), 0, -200)


def test_saving_and_loading_gives_the_same_model_and_processing(
    student: MobileVlm, reference: Path, tmp_path: Path, mixed: dict[str, torch.Tensor]
) -> None:
    processing = read_processing(reference / "student")
    save_checkpoint(student, tmp_path / "saved", processing)
    again, theirs = load_vlm(tmp_path / "saved"), read_processing(tmp_path / "saved")
    inputs = (mixed["input_ids"], mixed["attention_mask"], mixed["pixel_values"])
    assert torch.equal(student.logits(*inputs), again.logits(*inputs))
    assert (theirs.image, theirs.prompt, theirs.tokenizer) == (
        processing.image,
        processing.prompt,
        processing.tokenizer,
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["MobileVlm"]
    assert not list((tmp_path / "saved").glob("*.bin"))


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_the_template_is_kept(student: MobileVlm, reference: Path, tmp_path: Path, template: str) -> None:
    processing = read_processing(reference / "student")
    changed = type(processing)(processing.image, TEMPLATES[template], processing.tokenizer_path, processing.tokenizer)
    save_checkpoint(student, tmp_path / "saved", changed)
    assert read_processing(tmp_path / "saved").prompt.template == template


def test_transformers_tokenizer_and_chat_template_agree_with_ours(
    student: MobileVlm, reference: Path, tmp_path: Path
) -> None:
    processing = read_processing(reference / "student")
    save_checkpoint(student, tmp_path / "saved", processing)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ours = open_tokenizer(processing.tokenizer, tmp_path / "saved")
    question = "What colour is the circle?\nAnswer with one word."
    assert theirs(question)["input_ids"] == [1, *ours.encode(question)]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token_id) == ("<s>", "</s>", 0)
    talk = [{"role": "user", "content": f"<image>\n{question}"}]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<s>" + build_prompt(processing.prompt, ours, processing.tokenizer, question, True).text
    talk += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "Why?"}]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.endswith("ASSISTANT: red</s>USER: Why? ASSISTANT:")


def test_a_fresh_student_shares_the_tower_and_depends_on_its_seed_alone(teacher: MobileVlm) -> None:
    one, same, other = (create_student(teacher, 32, 2, 2, 48, seed) for seed in (1, 1, 2))
    assert one.config.visual_tokens == teacher.config.visual_tokens
    tower = teacher.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in one.vision_tower.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    state = torch.get_rng_state()
    create_student(teacher, 32, 1, 2, 48, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UsageError, match="--hidden-size 30 must be a multiple of twice --heads 4"):
        create_student(teacher, 30, 2, 4, 48)
    with pytest.raises(UsageError, match="--layers 0, --heads -1: sizes must be 1 or more"):
        create_student(teacher, 32, 0, -1, 48)


def test_another_vocabulary_names_both_sizes(copied: Path) -> None:
    other_tokenizer(copied / "tokenizer.model", 400)
    with pytest.raises(UsageError, match=r"tokenizer\.model has 400 tokens, but the model in .* vocabulary of 512"):
        read_processing(copied)


def test_missing_or_unsupported_processing_is_one_line(copied: Path) -> None:
    processor = copied.parent / "clip-tiny" / "preprocessor_config.json"
    edit(processor, resample=2)
    with pytest.raises(UsageError, match="resample 2 is not supported; supported: 3"):
        read_processing(copied)
    edit(processor, resample=3, image_mean=[0.5])
    with pytest.raises(UsageError, match=r"'image_mean' is \[0.5\]"):
        read_processing(copied)
    processor.unlink()
    with pytest.raises(UsageError, match="preprocessor_config.json is missing in .*clip-tiny"):
        read_processing(copied)
    (copied / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match="tokenizer.model is missing"):
        read_processing(copied)


def test_a_checkpoint_without_a_tower_says_where_to_put_it(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, copied / "model.safetensors")
    vlm = load_vlm(copied)  # the tower is taken from the folder that the config names
    assert torch.isfinite(vlm.vision_tower.embeddings.class_embedding).all()
    shutil.rmtree(copied.parent / "clip-tiny")
    with pytest.raises(
        UsageError, match="has no vision tower.*'clip-tiny' is no folder on this disk; put the CLIP tower"
    ):
        load_vlm(copied)


def test_llavas_own_layout_is_the_published_one(copied: Path, reference: Path) -> None:
    edit(copied / "config.json", architectures=["LlavaLlamaForCausalLM"], model_type="llava_llama")
    wanted = load_vlm(reference / "student").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load_vlm(copied).state_dict().items())
    assert read_processing(copied).prompt == TEMPLATES["v1"]


@pytest.mark.parametrize(
    "impossible",
    [{"num_attention_heads": 3}, {"hidden_size": -4}, {"hidden_size": "wide"}, {"num_key_value_heads": 0},
     {"vocab_size": -1}, {"hidden_act": "nope"}],
)  # fmt: skip
def test_sizes_that_fit_no_model_are_one_line(copied: Path, impossible: dict[str, object]) -> None:
    edit(copied / "config.json", **impossible)
    with pytest.raises(UsageError, match=r"config\.json describes no model"):
        load_vlm(copied)
