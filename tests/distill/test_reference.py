"""The recorded outputs of the published code: logits, and the paper's terms through the public door."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from distill.align_kd import TERMS, AlignKD
from distill.losses import focus_tokens
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import look, spans_of, supervised_rows, text_to_image_attention

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
    assert set(weights) == set(module.adapter_state())
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


def test_rows_columns_and_focus_are_the_recorded_ones(case: Case, student: MobileVlm, teacher: MobileVlm) -> None:
    features = teacher.tower_features(case.pixel_values)
    seen = look(teacher, case.input_ids, case.attention_mask, case.labels, features)
    spans = spans_of(seen.expanded)
    block = text_to_image_attention(teacher, seen.expanded, spans)
    picked = focus_tokens(block, spans.row_mask, 16)
    recorded = case.losses["corrected"]
    assert picked.tolist() == recorded["topk_local"]
    heads = student.config.text_config.num_attention_heads
    assert heads * int(spans.row_mask.sum()) * spans.columns.shape[1] == recorded["attn_elements"]
    assert len(supervised_rows(seen)[1]) == recorded["n_supervised"]


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
