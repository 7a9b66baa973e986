"""AlignKD as a module: gradients, groups, the teacher's rest, mixed batches, chunks; attention against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaConfig

from distill.align_kd import row_terms
from distill.align_kd.module import AlignKD
from distill.losses.attention import attention_kl
from distill.losses.divergences import forward_kl
from distill.models.create import create_student, create_vlm
from distill.models.mobilevlm import VISION_KIND, MobileVlm
from distill.models.roles import look, predicting_rows, spans_of, text_to_image_attention, tower_hash
from distill.settings.terms import PRESETS, PUBLISHED_TERMS, TERMS, TermSettings, TermWeights
from distill.settings.training import DistillConfig
from distill.teacher.view import group_bounds
from distill.training.parameter_groups import parameter_groups
from distill.training.term_meter import gradient_norms

if TYPE_CHECKING:
    from tests.distill.conftest import Case

Batch = dict[str, torch.Tensor]
TAUGHT = tuple(name for name in TERMS if name != "cross_entropy" and name not in PUBLISHED_TERMS)


def config_for(folder: Path, **changes: object) -> DistillConfig:
    return DistillConfig(student=folder, teacher=folder, data=folder, output=folder / "new", **changes)  # type: ignore[arg-type]


def rows_of(batch: Batch, rows: list[int], images: list[int]) -> Batch:
    """Some conversations of a batch, cut to their own length."""
    longest = int(batch["attention_mask"][rows].sum(1).max())
    part = {name: batch[name][rows, :longest] for name in ("input_ids", "attention_mask", "labels")}
    return part | ({"pixel_values": batch["pixel_values"][images]} if images else {})


def test_flags_and_terms_have_the_same_names() -> None:
    assert set(TermWeights.__dataclass_fields__) == set(TERMS)
    assert all(set(preset) <= set(TERMS) for preset in PRESETS.values())


@pytest.mark.parametrize("gqa", [False, True], ids=["all heads have keys", "shared keys"])
def test_attention_block_is_what_transformers_computes(student: MobileVlm, mixed: Batch, gqa: bool) -> None:
    vlm = student
    if gqa:
        text = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=512,
        )
        vlm = create_vlm(text, student.vision_tower, student.config, seed=1)
    with torch.no_grad():
        seen = look(
            vlm,
            mixed["input_ids"],
            mixed["attention_mask"],
            mixed["labels"],
            vlm.encode_images(mixed["pixel_values"]),
        )
        spans = spans_of(seen.expanded)
        block = text_to_image_attention(vlm, seen, spans)  # [n, H, R, N]
        vlm.language_model.set_attn_implementation("eager")
        out = vlm.language_model(
            inputs_embeds=seen.expanded.inputs_embeds,
            attention_mask=seen.expanded.attention_mask,
            output_attentions=True,
            use_cache=False,
        )
    whole = out.attentions[0]  # [B, H, L, L]
    assert spans.sample.tolist() == [0, 2] and spans.row_mask.sum(1).tolist() == [15, 3]
    for i, sample in enumerate(spans.sample.tolist()):
        rows = spans.rows[i][spans.row_mask[i]]
        expected = whole[sample][:, rows][:, :, spans.columns[i]]
        torch.testing.assert_close(block[i][:, spans.row_mask[i]], expected, atol=1e-6, rtol=1e-4)
        assert (seen.expanded.kinds[sample, spans.columns[i]] == VISION_KIND).all()
    real = seen.expanded.attention_mask.bool()
    torch.testing.assert_close(seen.hidden[real], out.last_hidden_state[real], atol=1e-4, rtol=1e-4)


def test_every_trainable_parameter_gets_a_gradient_and_is_in_one_group(
    student: MobileVlm, teacher: MobileVlm, mixed: Batch, tmp_path: Path
) -> None:
    module = AlignKD(student, teacher, PRESETS["paper"])
    module.total(module(**mixed)).backward()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    groups = parameter_groups(module, config_for(tmp_path, projector_learning_rate=1e-3))
    counted = [id(p) for group in groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in trainable.values())
    assert {group["name"]: group["lr"] for group in groups} == {"decoder": 4e-5, "projector": 1e-3, "adapters": 1e-3}
    names = {name for name in trainable if not name.startswith("student.")}
    assert names == {"head_map.weight", "head_map.bias", "visual_map.weight", "visual_map.bias"}
    assert not any(name.startswith("student.vision_tower") for name in trainable)


def test_a_batch_of_text_uses_every_trained_parameter_and_moves_only_what_reads_text(
    student: MobileVlm, teacher: MobileVlm, mixed: Batch
) -> None:
    module = AlignKD(student, teacher, dict.fromkeys(TAUGHT, 1.0) | {"cross_entropy": 1.0}, learned_balance=True)
    text = rows_of(mixed, [1], [0]) | {"pixel_values": mixed["pixel_values"][:1] * 0}
    module.total(module(**text)).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    seeing = [name for name in gradients if "projector." in name or "_map." in name]
    assert len(seeing) == 12 and not any(gradients[name].any() for name in seeing)  # type: ignore[union-attr]
    without = module(**rows_of(mixed, [1], []))
    assert {name: value.item() for name, value in module(**text).items()} == pytest.approx(
        {name: value.item() for name, value in without.items()}, abs=1e-6
    )


@pytest.mark.parametrize(
    ("mask", "rows"), [("answer", 9), ("answer+vision", 9 + 2 * 144 - 1), ("all", 16 + 143 + 9 + 7 + 143)]
)
def test_the_divergences_look_where_the_mask_says(
    mask: str, rows: int, student: MobileVlm, teacher: MobileVlm, mixed: Batch
) -> None:
    weights = {"cross_entropy": 1.0, "forward_kl": 1.0}
    terms = AlignKD(student, teacher, weights, TermSettings(mask=mask))(**mixed)
    plain = AlignKD(student, teacher, weights)(**mixed)
    assert terms["cross_entropy"].item() == pytest.approx(plain["cross_entropy"].item(), rel=1e-5)
    visual = [vlm.encode_images(mixed["pixel_values"]) for vlm in (student, teacher)]
    seen = [
        look(vlm, mixed["input_ids"], mixed["attention_mask"], mixed["labels"], tokens)
        for vlm, tokens in zip((student, teacher), visual, strict=True)
    ]
    hidden = [predicting_rows(roles, mask)[0] for roles in seen]
    assert len(hidden[0]) == rows
    expected = forward_kl(student.lm_head(hidden[0]), teacher.lm_head(hidden[1]))
    assert terms["forward_kl"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_groups_compare_each_layer_with_the_teachers_layers_at_its_depth(
    student: MobileVlm, teacher: MobileVlm, mixed: Batch
) -> None:
    assert group_bounds(2, 4) == [(0, 2), (2, 4)] and group_bounds(4, 2) == [(0, 1), (0, 1), (1, 2), (1, 2)]
    module = AlignKD(student, teacher, {"attention_groups": 1.0})
    found = module(**mixed)["attention_groups"].item()
    batch = (mixed["input_ids"], mixed["attention_mask"], mixed["labels"])
    ours = look(student, *batch, student.encode_images(mixed["pixel_values"]), every_layer=True)
    theirs = look(teacher, *batch, teacher.encode_images(mixed["pixel_values"]), every_layer=True)
    spans = spans_of(ours.expanded)
    values = []
    for layer in (0, 1):
        pair = [text_to_image_attention(teacher, theirs, spans, 2 * layer + i).mean(1, keepdim=True) for i in (0, 1)]
        block = text_to_image_attention(student, ours, spans, layer)
        values.append(attention_kl(block, (pair[0] + pair[1]) / 2, spans.row_mask).item())
    assert found == pytest.approx(sum(values) / 2, rel=1e-5)


def test_the_taught_share_scales_all_but_the_cross_entropy(
    student: MobileVlm, teacher: MobileVlm, mixed: Batch
) -> None:
    module = AlignKD(student, teacher, {"cross_entropy": 2.0, "forward_kl": 3.0})
    terms = {"cross_entropy": torch.tensor(5.0), "forward_kl": torch.tensor(7.0)}
    assert module.total(terms).item() == 31 and module.total(terms, 0.5).item() == 20.5
    learned = AlignKD(student, teacher, {"cross_entropy": 2.0, "forward_kl": 3.0}, learned_balance=True)
    assert learned.total(terms).item() == 31 and learned.balance is not None and set(learned.balance) == {"forward_kl"}
    learned.total(terms).backward()
    gradient = learned.balance["forward_kl"].grad
    assert gradient is not None and gradient.item() == pytest.approx(3 * (1 - 7))


def test_an_unfrozen_tower_trains_up_to_the_layer_that_is_read(student: MobileVlm, mixed: Batch) -> None:
    module = AlignKD(student, None, PRESETS["ce"], freeze_tower=False)
    module.total(module(**mixed)).backward()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []
    layers = {name.split(".")[4] for name in trainable if "vision_tower.encoder.layers" in name}
    assert layers == {"0", "1"}  # of three: hidden state -2 is what layer 1 puts out


def test_the_teacher_rests(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = AlignKD(student, teacher, dict.fromkeys(TERMS, 1.0)).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    module.total(module(**mixed)).backward()
    optimizer.step()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in module.state_dict())


def test_a_mixed_batch_is_the_mean_of_its_parts(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    module = AlignKD(student, teacher, dict.fromkeys(TERMS, 1.0))
    with torch.no_grad():
        together = module(**mixed)
        first, text, last = (module(**rows_of(mixed, [i], images)) for i, images in ((0, [0]), (1, []), (2, [1])))
    for name in ("cross_entropy", "reverse_kl", "forward_kl"):  # three supervised rows each
        mean = (first[name] + text[name] + last[name]) / 3
        assert together[name].item() == pytest.approx(mean.item(), rel=1e-4)
    assert {name: text[name].item() for name in ("attention", "visual", "focus")} == dict.fromkeys(
        ("attention", "visual", "focus"), 0.0
    )
    for name in ("visual", "focus"):
        assert together[name].item() == pytest.approx(((first[name] + last[name]) / 2).item(), rel=1e-4)
    weighted = (15 * first["attention"] + 3 * last["attention"]) / 18  # text rows after each image
    assert together["attention"].item() == pytest.approx(weighted.item(), rel=1e-4)


def test_nothing_supervised_gives_zero_not_nan(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    module = AlignKD(student, teacher, PRESETS["paper"])
    terms = module(**(mixed | {"labels": torch.full_like(mixed["labels"], -100)}))
    module.total(terms).backward()
    assert terms["cross_entropy"].item() == 0 and terms["reverse_kl"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(teacher: MobileVlm, mixed: Batch) -> None:
    twin = create_student(teacher, 128, 4, 8, 192)
    twin.load_state_dict(teacher.state_dict())
    module = AlignKD(twin, teacher, dict.fromkeys(TAUGHT, 1.0))
    assert module.head_map is not None and module.visual_map is not None and module.student_map is not None
    with torch.no_grad():
        module.head_map.weight.copy_(torch.eye(8)[..., None, None])
        for linear in (module.visual_map, module.student_map):
            linear.weight.copy_(torch.eye(128))
            linear.bias.zero_()
        module.head_map.bias.zero_()
        terms = module(**mixed)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(dict.fromkeys(TAUGHT, 0.0), abs=1e-5)


def test_chunks_of_rows_change_nothing(
    student: MobileVlm, teacher: MobileVlm, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"cross_entropy": 1.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}
    module = AlignKD(student, teacher, weights, TermSettings(temperature=2.0))
    results = []
    for limit in (row_terms.MAX_LOGITS, 2 * 512):  # everything at once; two rows at a time
        monkeypatch.setattr(row_terms, "MAX_LOGITS", limit)
        module.zero_grad()
        terms = module(**mixed)
        norms = gradient_norms(module, terms)
        module.total(terms).backward()
        head = module.student.lm_head.weight.grad
        assert head is not None
        results.append(({name: value.item() for name, value in terms.items()}, norms, head.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-6, rtol=1e-4)


def test_no_logits_of_unsupervised_positions_are_made(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    rows: list[int] = []
    for vlm in (student, teacher):
        vlm.lm_head.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[0]))
    AlignKD(student, teacher, PRESETS["paper"])(**mixed)
    assert rows == [9, 9]


def test_the_shared_tower_runs_once(student: MobileVlm, teacher: MobileVlm, case: Case) -> None:
    calls: list[str] = []
    student.vision_tower.embeddings.register_forward_hook(lambda *_: calls.append("student"))
    teacher.vision_tower.embeddings.register_forward_hook(lambda *_: calls.append("teacher"))
    module = AlignKD(student, teacher, PRESETS["paper"])
    expected = module(**case.batch)
    assert calls == ["student"] and module.shares_tower
    known = {name: value for name, value in case.batch.items() if name != "pixel_values"}
    again = module(**known, image_features=student.tower_features(case.pixel_values))
    assert {n: v.item() for n, v in again.items()} == pytest.approx({n: v.item() for n, v in expected.items()})
    with torch.no_grad():
        next(teacher.vision_tower.parameters()).add_(0.5)
    assert tower_hash(student) != tower_hash(teacher)
    calls.clear()
    other = AlignKD(student, teacher, PRESETS["paper"])
    other(**case.batch)
    assert calls == ["student", "teacher"] and not other.shares_tower


def test_gradient_norms_are_those_of_each_weighted_term(student: MobileVlm, teacher: MobileVlm, mixed: Batch) -> None:
    module = AlignKD(student, teacher, {"cross_entropy": 1.0, "attention": 3.0})
    norms = gradient_norms(module, module(**mixed))
    for name, weight in module.weights.items():
        module.zero_grad()
        (weight * module(**mixed)[name]).backward()
        squares = [p.grad.square().sum() for p in module.student.parameters() if p.grad is not None]
        assert norms[name] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)
        assert norms[name] > 0


def test_a_teacher_in_half_precision_shares_the_tower_and_says_nearly_the_same(
    student: MobileVlm, teacher: MobileVlm, mixed: Batch
) -> None:
    weights = dict.fromkeys(TERMS, 1.0)
    exact = AlignKD(student, teacher, weights)
    expected = exact(**mixed)
    module = AlignKD(student, teacher.to(torch.bfloat16), weights)
    assert module.shares_tower
    terms = module(**mixed)
    module.total(terms).backward()
    assert all(value.dtype == torch.float32 for value in terms.values())
    for name in ("cross_entropy", "reverse_kl", "attention", "attention_kl", "visual", "normed_visual", "relation"):
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=0.03), name
    assert terms["cross_entropy"].item() == expected["cross_entropy"].item()
