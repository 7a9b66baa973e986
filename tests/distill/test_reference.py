"""The recorded outputs of the published code: logits, and the paper's terms through the public door."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from distill.align_kd.module import AlignKD
from distill.losses.attention import focus_tokens
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import attention_rows, look, predicting_rows, spans_of, text_to_image_attention
from distill.settings.terms import PRESETS, TERMS
from distill.training.term_meter import gradient_norms

if TYPE_CHECKING:
    from tests.distill.conftest import Case

RECORDED = {
    "reverse_kl": "rkl",
    "forward_kl": "fkl",
    "jensen_shannon": "jsd_0.5",
    "skew_kl": "skew_fkl_0.1",
    "attention": "attn_text_query_vision",
    "visual": "v_all",
    "focus": "v_focus",
}


def with_recorded_adapters(module: AlignKD, reference: Path) -> AlignKD:
    recorded = load_file(reference / "adapters.safetensors")
    assert module.head_map is not None and module.visual_map is not None
    weights = {
        "head_map.weight": recorded["attn_adapter.0.weight"],
        "head_map.bias": recorded["attn_adapter.0.bias"],
        "visual_map.weight": recorded["proj_adapter.0.weight"][..., 0],
        "visual_map.bias": recorded["proj_adapter.0.bias"],
    }
    assert set(weights) == {name for name in module.adapter_state() if not name.startswith("student_map.")}
    module.load_state_dict(weights, strict=False)
    return module


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_logits_are_the_recorded_ones(who: str, case: Case, request: pytest.FixtureRequest) -> None:
    vlm: MobileVlm = request.getfixturevalue(who)
    with torch.no_grad():
        logits = vlm.logits(case.input_ids, case.attention_mask, case.pixel_values)
    assert logits.shape[1] == case.losses["L"]
    torch.testing.assert_close(logits[:, -8:], case.recorded[f"plain_b1.{who}_logits_last8"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), case.recorded[f"plain_b1.{who}_logsumexp"], atol=1e-4, rtol=0)
    if who == "student":
        assert torch.equal(logits.argmax(-1), case.recorded["plain_b1.student_argmax"].long())


def test_every_term_is_the_recorded_one(case: Case, student: MobileVlm, teacher: MobileVlm, reference: Path) -> None:
    module = with_recorded_adapters(AlignKD(student, teacher, dict.fromkeys(TERMS, 1.0)), reference)
    terms = module(**case.batch)
    recorded = case.losses["corrected"]
    found = {name: terms[name].item() for name in RECORDED}
    assert found == pytest.approx({name: recorded[theirs] for name, theirs in RECORDED.items()}, abs=1e-4)
    assert terms["cross_entropy"].item() == pytest.approx(case.losses["student_ce"], abs=1e-4)
    assert set(terms) == set(TERMS)


def test_the_published_code_computes_what_was_recorded(
    case: Case, student: MobileVlm, teacher: MobileVlm, reference: Path
) -> None:
    module = with_recorded_adapters(AlignKD(student, teacher, PRESETS["published_code"]), reference)
    terms = module(**case.batch)
    recorded = case.losses["as_coded"]
    names = {"published_logits": "logits_fp16", "published_attention": "attn", "visual": "v_all"}
    names["published_focus"] = "v_topk"
    assert {name: terms[name].item() for name in names} == pytest.approx(
        {name: recorded[theirs] for name, theirs in names.items()}, abs=1e-4
    )
    assert module.total(terms).item() == pytest.approx(recorded["total"], abs=1e-3)
    norms = gradient_norms(module, terms)
    assert norms["published_attention"] == 0 and all(norms[name] > 0 for name in norms if name != "published_attention")
    adapters = [p for name, p in module.named_parameters() if not name.startswith("student.")]
    assert adapters and not any(p.requires_grad for p in adapters)  # in no optimizer, as there


def test_the_block_of_the_published_attention_term_is_zero(case: Case, teacher: MobileVlm) -> None:
    seen = look(teacher, case.input_ids, case.attention_mask, case.labels, teacher.encode_images(case.pixel_values))
    spans = spans_of(seen.expanded)
    weights = attention_rows(teacher, seen.layer_inputs[0], spans.sample, spans.columns)  # vision queries
    text_keys = spans.rows[spans.row_mask]
    assert weights[..., text_keys].abs().max() == 0 and weights.sum() > 0


def test_rows_columns_and_focus_are_the_recorded_ones(case: Case, student: MobileVlm, teacher: MobileVlm) -> None:
    seen = look(teacher, case.input_ids, case.attention_mask, case.labels, teacher.encode_images(case.pixel_values))
    spans = spans_of(seen.expanded)
    block = text_to_image_attention(teacher, seen, spans)
    picked = focus_tokens(block, spans.row_mask, 16)
    recorded = case.losses["corrected"]
    assert picked.tolist() == recorded["topk_local"]
    heads = student.config.text_config.num_attention_heads
    assert heads * int(spans.row_mask.sum()) * spans.columns.shape[1] == recorded["attn_elements"]
    assert len(predicting_rows(seen)[1]) == recorded["n_supervised"]


def test_total_is_the_weighted_sum(case: Case, student: MobileVlm, teacher: MobileVlm) -> None:
    module = AlignKD(student, teacher, {"cross_entropy": 0.5, "forward_kl": 2.0})
    terms = module(**case.batch)
    expected = 0.5 * case.losses["student_ce"] + 2 * case.losses["corrected"]["fkl"]
    assert module.total(terms).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("select", [-2, -1, 0, 1])
def test_tower_stops_at_the_selected_layer(select: int, case: Case, student: MobileVlm) -> None:
    student.config.vision_select_layer = select
    with torch.no_grad():
        states = student.vision_tower(case.pixel_values, output_hidden_states=True).hidden_states
        torch.testing.assert_close(student.tower_features(case.pixel_values), states[select][:, 1:])
