"""Counts read off the ids are what the terms' means run over, so shares of micro batches add up to the whole batch."""

from __future__ import annotations

import pytest
import torch

from distill.align_kd.module import AlignKD
from distill.align_kd.term_counts import term_counts
from distill.models.mobilevlm import MobileVlm
from distill.models.roles import look, predicting_rows, spans_of
from distill.settings.terms import TermSettings

IDS = ("input_ids", "attention_mask", "labels")
TERMS = {
    name: 1.0
    for name in (
        "cross_entropy", "reverse_kl", "cosine", "attention", "attention_kl", "attention_groups", "visual", "focus",
        "relation", "normed_visual",
    )
}  # fmt: skip


@pytest.mark.parametrize("mask", ["answer", "answer+vision", "all"])
def test_counts_are_those_of_the_expanded_batch(
    student: MobileVlm, teacher: MobileVlm, mixed: dict[str, torch.Tensor], mask: str
) -> None:
    mixed["labels"][0, 2] = mixed["input_ids"][0, 2]  # what the first image's last visual token predicts
    module = AlignKD(student, teacher, TERMS, TermSettings(mask=mask))
    counts = term_counts(module, *(mixed[name] for name in IDS))
    with torch.no_grad():
        visual = student.encode_images(mixed["pixel_values"])
        roles = look(student, *(mixed[name] for name in IDS), visual)
    assert counts["cross_entropy"] == len(predicting_rows(roles)[0])
    assert counts["reverse_kl"] == counts["cosine"] == len(predicting_rows(roles, mask)[0])
    rows = spans_of(roles.expanded).row_mask.sum()
    assert counts["attention"] == counts["attention_kl"] == counts["attention_groups"] == rows
    assert all(counts[name] == 2 for name in ("visual", "focus", "relation", "normed_visual"))


@pytest.mark.parametrize("mask", ["answer", "answer+vision", "all"])
def test_shares_of_micro_batches_add_up_to_the_whole_batch(
    student: MobileVlm, teacher: MobileVlm, mixed: dict[str, torch.Tensor], mask: str
) -> None:
    """Rows 0 and 1 (an image, text alone), then row 2 (an image): means of these would not average to the whole's."""
    mixed["labels"][1, 3:] = mixed["input_ids"][1, 3:] * mixed["attention_mask"][1, 3:] - 100 * (
        1 - mixed["attention_mask"][1, 3:]
    )
    module = AlignKD(student, teacher, TERMS, TermSettings(mask=mask)).eval()
    parts = [{name: mixed[name][rows] for name in IDS} for rows in (slice(0, 2), slice(2, 3))]
    total = {n: c for n, c in term_counts(module, *(mixed[name] for name in IDS)).items()}
    with torch.no_grad():
        whole = module(**mixed)
        added = dict.fromkeys(TERMS, 0.0)
        for number, part in enumerate(parts):
            terms = module(**part, pixel_values=mixed["pixel_values"][number : number + 1])
            for name, value in terms.items():
                added[name] += float(value * term_counts(module, **part)[name] / total[name])
    assert added == pytest.approx({name: float(value) for name, value in whole.items()}, rel=2e-4, abs=1e-6)


def test_learned_weights_count_once_a_step(student: MobileVlm, teacher: MobileVlm) -> None:
    module = AlignKD(student, teacher, {"cross_entropy": 1.0, "visual": 2.0}, learned_balance=True)
    assert module.balance is not None
    module.balance["visual"].data.fill_(0.3)
    shares = {"cross_entropy": torch.tensor(1.0), "visual": torch.tensor(0.5)}
    whole = module.total({name: 4 * value for name, value in shares.items()}, 0.5)
    torch.testing.assert_close(4 * module.total(shares, 0.5, parts=4), whole)
