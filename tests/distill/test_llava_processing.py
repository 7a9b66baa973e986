"""Files beside a LLaVA checkpoint: ids and pixels as transformers makes them, labels, the way back, bad files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from bundle.errors import UsageError
from bundle.image import preprocess
from bundle.prompt import build_prompt
from bundle.tokenizer import Tokenizer, open_tokenizer
from distill.batches.encoding import IGNORED, encode_row
from distill.data.rows import Row, Turn
from distill.models import load_vlm
from distill.models.create import create_student
from distill.models.processing import Processing, read_processing
from distill.models.save import save_checkpoint
from tests.distill.llava_checkpoints import (
    CHATML,
    INTERLEAVE,
    VICUNA,
    make_llava,
    write_images,
    write_llava,
    write_whole,
)

PROCESSORS: dict[str, Any] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
}
TALK = (Turn("what colour is the circle?", "red", True), Turn("how many are there?", "three", False))
CHATS = [("llama", VICUNA), ("qwen2", CHATML), ("qwen2", INTERLEAVE)]


def opened(folder: Path) -> tuple[Processing, Tokenizer]:
    processing = read_processing(folder)
    return processing, open_tokenizer(processing.tokenizer, folder)


def messages(turns: tuple[Turn, ...], answered: int) -> list[dict[str, Any]]:
    talk: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        image = [{"type": "image"}] if turn.has_image else []
        talk.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        if number < answered:
            talk.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return talk


@pytest.mark.parametrize(("text", "chat"), CHATS)
def test_prompts_are_the_ids_of_transformers(text: str, chat: str, tmp_path: Path) -> None:
    write_whole(tmp_path, text, chat=chat)
    processing, tokenizer = opened(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for turn in TALK:
        asked = theirs.apply_chat_template(messages((turn,), 0), tokenize=False, add_generation_prompt=True)
        prompt = build_prompt(processing.prompt, tokenizer, processing.tokenizer, turn.question, turn.has_image)
        assert prompt.text == asked and list(prompt.token_ids) == theirs(asked)["input_ids"]
        assert prompt.token_ids.count(processing.tokenizer.image_token_id) == turn.has_image
    assert processing.tokenizer.bos_id == (1 if text == "llama" else None)
    assert processing.prompt.template == "chat"


@pytest.mark.parametrize(("text", "chat"), CHATS)
def test_labels_are_the_answers_and_their_end(text: str, chat: str, tmp_path: Path) -> None:
    write_whole(tmp_path, text, chat=chat)
    processing, tokenizer = opened(tmp_path)
    ids, labels = encode_row(Row(0, tmp_path, TALK), processing, tokenizer)
    assert len(ids) == len(labels) and all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    prompt = build_prompt(processing.prompt, tokenizer, processing.tokenizer, TALK[0].question, True).token_ids
    assert tuple(ids[: len(prompt)]) == prompt and set(labels[: len(prompt)]) == {IGNORED}
    said: list[list[int]] = [[]]
    for label in labels[len(prompt) :]:
        if label == IGNORED:
            said += [[]] if said[-1] else []
        else:
            said[-1].append(label)
    eos = processing.tokenizer.eos_ids[0]
    assert [one[-1] for one in said] == [eos, eos]
    assert [tokenizer.decode(one).strip() for one in said] == ["red", "three"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    whole = theirs(theirs.apply_chat_template(messages(TALK, 2), tokenize=False))["input_ids"]
    if chat == CHATML:
        assert ids == whole[: len(ids)]


def test_names_of_special_tokens_are_refused_in_a_users_text(tmp_path: Path) -> None:
    write_whole(tmp_path, "qwen2", chat=CHATML)
    processing, tokenizer = opened(tmp_path)
    assert 5 not in tokenizer.encode("a<|im_end|>") and tokenizer.encode_template("<|im_end|>", "<image>", 6) == [5]
    with pytest.raises(UsageError, match=r"the question holds '<\|im_end\|>'"):
        build_prompt(processing.prompt, tokenizer, processing.tokenizer, "why<|im_end|>", False)
    with pytest.raises(UsageError, match=r"row 7: .*holds '</s>'"):
        encode_row(Row(7, None, (Turn("why", "a</s>", False),)), processing, tokenizer)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("shape", [(40, 31), (24, 60), (24, 24)])
def test_pixels_are_those_of_the_image_processor(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    write_whole(tmp_path)
    write_images(tmp_path, kind)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (*shape, 3), dtype=np.uint8))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    if kind == "LlavaImageProcessor":  # a picture padded to a square, then resized by its shortest edge
        settings["do_pad"] = True
    wanted = PROCESSORS[kind](**settings)(picture, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(preprocess(picture, read_processing(tmp_path).image), wanted, atol=1e-5)


@pytest.mark.parametrize(("text", "tower", "chat"), [
    ("llama", "clip_vision_model", VICUNA), ("qwen2", "siglip_vision_model", CHATML),
])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_saved_as_it_came(text: str, tower: str, chat: str, tied: bool, tmp_path: Path) -> None:
    theirs = write_whole(tmp_path / "a", text, tower, chat, text_changes={"tie_word_embeddings": tied})
    vlm, processing = load_vlm(tmp_path / "a"), read_processing(tmp_path / "a")
    save_checkpoint(vlm, tmp_path / "b", processing)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_processing(tmp_path / "b").prompt == processing.prompt
    assert read_processing(tmp_path / "b").image == processing.image
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "b").eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == chat
    pixels = torch.randn(1, 3, 24, 24)
    ids = torch.tensor([[1, 6, 8, 9]])
    with torch.no_grad():
        spread = torch.tensor([[1, *[6] * vlm.config.visual_tokens, 8, 9]])
        wanted = again(input_ids=spread, pixel_values=pixels).logits
        torch.testing.assert_close(load_vlm(tmp_path / "b").logits(ids, None, pixels), wanted, atol=1e-5, rtol=1e-5)


def test_a_fresh_student_of_a_llava_is_a_llava(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "qwen2", "siglip_vision_model", CHATML, text_changes={"tie_word_embeddings": True})
    teacher = load_vlm(tmp_path / "a")
    student = create_student(teacher, 16, 1, 2, 24)
    assert student.config.text_config.model_type == "qwen2" and student.image_token_id == teacher.image_token_id
    save_checkpoint(student, tmp_path / "b", read_processing(tmp_path / "a"))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert torch.equal(again.lm_head.weight, student.lm_head.weight)
    assert torch.equal(load_vlm(tmp_path / "b").lm_head.weight, student.lm_head.weight)


def test_our_layout_holds_any_parts(reference: Path, tmp_path: Path) -> None:
    changes = {"vocab_size": 512, "tie_word_embeddings": True}
    model = make_llava("qwen2", "siglip_vision_model", text_changes=changes, multimodal_projector_bias=False)
    vlm = load_vlm(write_llava(tmp_path / "a", model))
    vlm.config.llava_names = None
    save_checkpoint(vlm, tmp_path / "b", read_processing(reference / "student"))
    again = load_vlm(tmp_path / "b")
    given = (torch.tensor([[1, 110, 8, 9]]), None, torch.randn(1, 3, 24, 24))
    assert torch.equal(vlm.logits(*given), again.logits(*given))
    assert again.lm_head.weight is again.language_model.embed_tokens.weight


def spoil_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def replace(name: str, text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(("spoil", "message"), [
    (replace("tokenizer.json", None), "has no tokenizer.json; write it there with transformers"),
    (replace("tokenizer.json", "{}"), "cannot be read as a tokenizer.json"),
    (replace("chat_template.jinja", None), "has no chat template"),
    (replace("chat_template.jinja", "{{ messages[0]['content'] }} {{ messages[0]['content'] }}"), "question 2 times"),
    (replace("chat_template.jinja", "{% for m in %}"), "cannot be cut .*TemplateSyntaxError"),
    (replace("chat_template.jinja", "{{ raise_exception('never') }}"), "cannot be cut .*never"),
    (spoil_json("config.json", image_token_index=90), "image token 90 of config.json is no token of its own"),
    (spoil_json("preprocessor_config.json", resample=2), "resample 2 is not supported; supported: 3"),
    (spoil_json("preprocessor_config.json", crop_size={"height": 20, "width": 20}), "makes no square"),
    (spoil_json("preprocessor_config.json", do_normalize=False), "do_normalize is False"),
    (spoil_json("preprocessor_config.json", size=48, crop_size=48), "of 48 pixels, the vision tower takes 24"),
    (spoil_json("preprocessor_config.json", image_std=0.5), "'image_std' is 0.5; give three numbers"),
    (replace("preprocessor_config.json", None), "has neither preprocessor_config.json nor an image_processor"),
])  # fmt: skip
def test_bad_files_are_one_line(spoil: Callable[[Path], None], message: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "m"))
    spoil(folder)
    with pytest.raises(UsageError, match=message) as error:
        read_processing(folder)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "m"
    write_whole(folder)
    return folder
