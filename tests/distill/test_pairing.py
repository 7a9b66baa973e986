"""Pairs: any widths, depths, heads, towers and numbers of visual tokens train; what bars a pair is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from bundle.errors import UsageError
from distill.align_kd.module import AlignKD
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.settings.terms import PUBLISHED_TERMS, TERMS
from distill.teacher.pairing import Side, check_pair
from tests.distill.llava_checkpoints import CHATML, WORDS, make_llava, write_images, write_llava, write_whole

TAUGHT = tuple(name for name in TERMS if name not in PUBLISHED_TERMS)
# 25 visual tokens of a SigLIP tower against 9 of CLIP's, other width, depth, heads and rows of the vocabulary
BIG: dict[str, Any] = {
    "text_changes": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 128},
    "tower_changes": {"image_size": 40},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher of other shape and the same words, and one of other words."""
    folder = tmp_path_factory.mktemp("pair")
    write_whole(folder / "student")
    write_whole(folder / "teacher", "qwen2", "siglip_vision_model", CHATML, **BIG)
    write_images(folder / "teacher", "SiglipImageProcessor", 40)
    write_whole(folder / "stranger", "qwen2", "siglip_vision_model", CHATML, words=WORDS[::-1], **BIG)
    write_images(folder / "stranger", "SiglipImageProcessor", 40)
    return folder


def side(folder: Path) -> Side:
    return Side.of(folder, load_vlm(folder), read_processing(folder))


def batch(students: int = 24, teachers: int = 40) -> dict[str, torch.Tensor]:
    """An image early, none, an image late; right-padded."""
    draw = torch.Generator().manual_seed(3)
    rows = [[1, 6, 20, 21, 22, 23, 24], [1, 30, 31, 32], [1, 7, 8, 6, 25, 26]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, len(row) - 2 : len(row)] = ids[i, len(row) - 2 : len(row)]
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels,
        "pixel_values": torch.randn(2, 3, students, students, generator=draw),
        "teacher_pixel_values": torch.randn(2, 3, teachers, teachers, generator=draw),
    }  # fmt: skip


def test_a_pair_of_two_shapes_trains_every_term(folders: Path) -> None:
    student, teacher = load_vlm(folders / "student"), load_vlm(folders / "teacher")
    module = AlignKD(student, teacher, dict.fromkeys(TAUGHT, 1.0), same_pictures=False)
    terms = module(**batch())
    assert set(terms) == set(TAUGHT) and all(torch.isfinite(value) and value > 0 for value in terms.values())
    module.total(terms).backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_batch_of_text_alone_brings_a_blank_picture_for_the_student_only(folders: Path) -> None:
    student, teacher = load_vlm(folders / "student"), load_vlm(folders / "teacher")
    module = AlignKD(student, teacher, dict.fromkeys(TAUGHT, 1.0), same_pictures=False)
    text = {name: value[1:2] for name, value in batch().items() if not name.endswith("pixel_values")}
    terms = module(**text, pixel_values=torch.zeros(1, 3, 24, 24))
    assert terms["reverse_kl"] > 0 and terms["visual"] == 0
    module.total(terms).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in module.parameters())


def test_a_deeper_student_learns_from_a_shallower_teacher(folders: Path) -> None:
    student, teacher = load_vlm(folders / "teacher"), load_vlm(folders / "student")
    given = batch(40, 24)
    module = AlignKD(student, teacher, dict.fromkeys(TAUGHT, 1.0), same_pictures=False)
    terms = module(**given)
    assert all(torch.isfinite(value) for value in terms.values())


def test_words_that_only_one_side_has_change_nothing(folders: Path, tmp_path: Path) -> None:
    """A teacher with more rows teaches what the same teacher without them teaches."""
    divergences = {"reverse_kl": 1.0, "forward_kl": 1.0, "jensen_shannon": 1.0}
    big = make_llava("qwen2", "siglip_vision_model", image_token_index=6, **BIG)
    fewer = make_llava(
        "qwen2",
        "siglip_vision_model",
        image_token_index=6,
        **BIG | {"text_changes": BIG["text_changes"] | {"vocab_size": 120}},
    )
    state = {
        n: v[:120] if n.endswith(("lm_head.weight", "embed_tokens.weight")) else v for n, v in big.state_dict().items()
    }
    fewer.load_state_dict(state)
    losses = []
    for name, model in (("big", big), ("fewer", fewer)):
        teacher = load_vlm(write_llava(tmp_path / name, model))
        module = AlignKD(load_vlm(folders / "student"), teacher, divergences, same_pictures=False)
        losses.append(module(**batch()))
    for name in divergences:
        torch.testing.assert_close(losses[0][name], losses[1][name], atol=1e-5, rtol=1e-5)


def test_terms_of_the_image_alone_need_no_common_words_and_no_decoder(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {"cross_entropy": 1.0, "visual": 1.0, "normed_visual": 1.0, "relation": 1.0}
    assert check_pair(side(folders / "student"), side(folders / "stranger"), terms, "answer")
    teacher = load_vlm(folders / "stranger")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher's decoder ran")

    monkeypatch.setattr(teacher.language_model, "forward", never)
    found = AlignKD(load_vlm(folders / "student"), teacher, terms, same_pictures=False)(**batch())
    assert all(found[name] > 0 for name in terms)


def test_what_a_pair_should_know(folders: Path) -> None:
    notes = check_pair(side(folders / "student"), side(folders / "teacher"), ["reverse_kl", "visual"], "answer")
    assert notes[0] == "student sees 24 px crop, 9 visual tokens; teacher 40 px stretch, 25 visual tokens"
    assert "pictures that are no squares" in notes[1] and "reads the student's prompt template" in notes[2]
    one = side(folders / "student")
    assert check_pair(one, one, TERMS, "all") == []


@pytest.mark.parametrize(("teacher", "terms", "mask", "message"), [
    ("stranger", ["reverse_kl", "visual"], "answer", r"vocabularies \(\d+ and \d+ tokens.*reverse_kl need one"),
    ("stranger", ["focus"], "answer", "focus need one: .*keep only terms of visual, normed_visual, relation"),
    ("stranger", ["attention_kl"], "answer", "attention_kl need one"),
    ("teacher", ["reverse_kl"], "all", "--mask all compares positions inside the image.* 9 and 25 visual tokens"),
    ("teacher", ["published_focus"], "answer", "compare models of one shape.* 9 .* 120 words, "),
])  # fmt: skip
def test_what_bars_a_pair(teacher: str, terms: list[str], mask: str, message: str, folders: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        check_pair(side(folders / "student"), side(folders / teacher), terms, mask)
    assert "\n" not in str(error.value)


def test_a_prompt_with_tokens_that_the_teacher_lacks(folders: Path, tmp_path: Path) -> None:
    small = side(folders / "student")
    small.config.text_config.vocab_size = 5
    with pytest.raises(
        UsageError, match=r"holds the token '.*' \(id \d+\), which teacher .* does not have \(5 words\)"
    ):
        check_pair(side(folders / "teacher"), small, ["reverse_kl"], "answer")


def test_a_tied_decoder_is_written_once_in_a_resumable_checkpoint(tmp_path: Path) -> None:
    vlm = load_vlm(write_llava(tmp_path / "m", make_llava(text_changes={"tie_word_embeddings": True})))
    module = AlignKD(vlm, None, {"cross_entropy": 1.0})
    state = module.state_dict()
    assert "student.lm_head.weight" not in state and "student.language_model.embed_tokens.weight" in state
    changed = {name: value + 1 for name, value in state.items()}
    assert module.load_state_dict(changed, strict=False).missing_keys == ["student.lm_head.weight"]
    assert torch.equal(vlm.lm_head.weight, changed["student.language_model.embed_tokens.weight"])


def test_the_command_distils_one_llava_into_another(folders: Path, tmp_path: Path, make_data: Any) -> None:
    from distill.settings.training import DistillConfig
    from distill.training.run import train

    output = tmp_path / "new"
    train(
        DistillConfig(
            student=folders / "student", teacher=folders / "teacher", data=make_data(), output=output, max_steps=2,
            batch_size=3, grad_norm_steps=1, save_steps=1,
        )
    )  # fmt: skip
    trained = LlavaForConditionalGeneration.from_pretrained(output)
    ours: MobileVlm = load_vlm(output)
    assert torch.equal(trained.lm_head.weight, ours.lm_head.weight)
    assert not torch.equal(ours.lm_head.weight, load_vlm(folders / "student").lm_head.weight)
    norms = json.loads((output / "training_log.json").read_text())["facts"]["gradient_norms"]
    assert {name for name, norm in norms.items() if norm > 0} == {
        "cross_entropy",
        "reverse_kl",
        "attention",
        "visual",
        "focus",
    }
