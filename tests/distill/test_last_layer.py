"""The last decoder layer on some rows against the whole decoder; a teacher whose decoder no term needs does not run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from distill.align_kd.module import AlignKD
from distill.models.create import create_vlm
from distill.models.last_layer import can_skip
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import look, predicting, predicting_rows

Batch = dict[str, torch.Tensor]


@pytest.mark.parametrize("keys", [4, 2], ids=["all heads have keys", "shared keys"])
@pytest.mark.parametrize("mask", ["answer", "answer+vision"])
def test_rows_and_gradients_are_those_of_the_whole_decoder(
    student: MobileVlm, mixed: Batch, keys: int, mask: str
) -> None:
    text = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=keys,
        intermediate_size=48,
        vocab_size=512,
    )
    vlm = create_vlm(text, student.vision_tower, student.config, seed=1)
    batch = (mixed["input_ids"], mixed["attention_mask"], mixed["labels"])
    results = []
    for asked in (mask, "all"):
        vlm.zero_grad()
        seen = look(vlm, *batch, vlm.encode_images(mixed["pixel_values"]), mask=asked)
        rows, targets = predicting_rows(seen, mask)
        rows.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
        results.append((rows.detach(), targets, gradients))
        outside = seen.hidden[:, :-1][~predicting(seen.expanded, mask)]
        assert outside.any() == (asked == "all")
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-3)


def test_the_mlp_keeps_half_and_runs_no_matrix_product_again(student: MobileVlm, mixed: Batch) -> None:
    batch = (mixed["input_ids"], mixed["attention_mask"], mixed["labels"])
    kept, products = [], []
    for mask in ("answer", "all"):
        visual = student.encode_images(mixed["pixel_values"]).detach()
        held: set[int] = set()

        def pack(tensor: torch.Tensor, held: set[int] = held) -> torch.Tensor:
            if tensor.shape[-1] == student.config.text_config.intermediate_size and tensor.shape[0] != 64:
                held.add(tensor.data_ptr())
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                seen = look(student, *batch, visual, mask=mask)
            rows = predicting_rows(seen, "answer")[0]
            rows.sum().backward()
        kept.append(len(held))
        products.append(counter.get_total_flops())
    assert kept == [4, 8]  # gate and up of two layers; otherwise their activation and product too
    assert products[0] < products[1]


def test_gradient_checkpointing_is_still_the_layers_own(student: MobileVlm, mixed: Batch) -> None:
    batch = (mixed["input_ids"], mixed["attention_mask"], mixed["labels"])
    visual = student.encode_images(mixed["pixel_values"]).detach()
    ran: list[bool] = []
    norm = student.language_model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    plain = look(student, *batch, visual, mask="answer").hidden
    assert len(ran) == 1
    student.train()
    student.gradient_checkpointing_enable()
    checked = look(student, *batch, visual, mask="answer").hidden
    assert len(ran) == 2
    torch.testing.assert_close(checked, plain)
    checked.sum().backward()
    assert len(ran) == 3, "the backward pass runs the whole layer again"


def test_only_a_plain_sdpa_decoder_skips(student: MobileVlm) -> None:
    assert can_skip(student.language_model)
    student.language_model.set_attn_implementation("eager")  # without a mask it would look ahead
    assert not can_skip(student.language_model)


def test_a_decoder_that_no_term_needs_does_not_run(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    ran: list[str] = []
    for name, vlm in (("student", student), ("teacher", teacher)):
        vlm.language_model.layers[0].self_attn.register_forward_hook(lambda *_, name=name: ran.append(name))
    weights = {"cross_entropy": 1.0, "attention": 1.0, "visual": 1.0, "focus": 1.0}
    found = AlignKD(student, teacher, weights)(**mixed)
    assert ran == ["student"]
    whole = AlignKD(student, teacher, weights | {"forward_kl": 1.0})(**mixed)
    assert ran == ["student", "student", "teacher"]
    assert {n: v.item() for n, v in found.items()} == pytest.approx({n: whole[n].item() for n in found}, rel=1e-5)
