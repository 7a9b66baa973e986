"""A model whose weights stay in their files computes what the whole one does, and holds few of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bundle.replay import relative_error
from distill.models.checkpoint import load_vlm, open_checkpoint
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.models.save import save_checkpoint
from export.golden.lockstep import forced_errors_together, golden_work, run_stages_together
from export.golden.recording import record
from export.model.streamed import LoadedModel, open_streamed, open_whole
from export.weights.dequantized import rounded
from export.weights.lazy import LazyWeights
from export.weights.plan import StoragePlan
from export.weights.recipe import Storage
from tests.export.conftest import STUDENT
from tests.export.models import random_vlm
from tests.export.one_by_one import forced_errors, run_forced, run_stages
from tests.export.test_frame import student_probes


class Counted(LazyWeights):
    """Weights that are copied when asked for, and how often."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights, self.reads = weights, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self.reads += 1
        out.copy_(self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_streamed_stages_are_those_of_the_whole_model() -> None:
    streamed, whole = open_streamed(STUDENT), load_vlm(STUDENT)
    for probe in (student_probes()[0], student_probes()[-1]):
        found, wanted = run_stages(streamed.vlm, probe), run_stages(whole, probe)
        assert found.fed_ids == wanted.fed_ids
        np.testing.assert_array_equal(found.greedy_logits, wanted.greedy_logits)
    assert all(parameter.is_meta for parameter in streamed.vlm.parameters())


@pytest.mark.parametrize("opened", [open_streamed, open_whole])
def test_questions_side_by_side_give_what_each_gives_alone(opened: type) -> None:
    model, whole, questions = opened(STUDENT), load_vlm(STUDENT), student_probes()
    alone = [run_stages(whole, probe) for probe in questions]
    work: list[int] = []
    for found, wanted in zip(run_stages_together(model, questions, work.append), alone, strict=True):
        assert found.fed_ids == wanted.fed_ids
        assert relative_error(found.greedy_logits, wanted.greedy_logits) < 1e-5
        assert relative_error(found.embeddings, wanted.embeddings) == 0
        assert (found.visual_tokens is None) == (wanted.visual_tokens is None)
        if found.visual_tokens is not None and wanted.visual_tokens is not None:
            assert relative_error(found.visual_tokens, wanted.visual_tokens) < 1e-5
    assert sum(work) == golden_work(whole, questions, greedy_rounds=1, forced_rounds=0)
    errors = forced_errors_together(model, questions, alone, work.append)
    assert sum(work) == golden_work(whole, questions, greedy_rounds=1, forced_rounds=1)
    assert errors.keys() == forced_errors(whole, questions, alone).keys()
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("kind", ["streamed", "whole"])
def test_other_weights_take_effect_and_the_rest_stays(kind: str) -> None:
    model = open_streamed(STUDENT) if kind == "streamed" else open_whole(STUDENT)
    changed = {"lm_head.weight": 2 * model.weights["lm_head.weight"].float()}
    probe = student_probes()[-1]
    before = run_stages(load_vlm(STUDENT), probe)
    model.use(changed)
    doubled = run_forced(model.vlm, probe, before.fed_ids).greedy_logits
    assert relative_error(doubled, 2 * before.greedy_logits) < 1e-5
    model.use({})
    assert relative_error(run_forced(model.vlm, probe, before.fed_ids).greedy_logits, before.greedy_logits) < 1e-5


def test_a_whole_and_a_streamed_model_are_recorded_alike(tmp_path: Path) -> None:
    found = {}
    for name, model in {"whole": open_whole(STUDENT), "streamed": open_streamed(STUDENT)}.items():
        (tmp_path / name).mkdir()
        stored = {"lm_head.weight": rounded(model.weights["lm_head.weight"].float(), Storage(8, None))}
        lines: list[str] = []
        recorded = record(
            model, stored, student_probes()[-2:], StoragePlan("onnx", "int4"), tmp_path / name, lines.append
        )
        vectors = {of: load_file(tmp_path / name / file) for of, file in recorded.vectors.items()}
        found[name] = recorded, vectors
        assert model.buffer_bytes == 0, "nothing stays in memory"
    (whole, wanted), (streamed, vectors) = found["whole"], found["streamed"]
    assert streamed == whole and whole.rounding_error["first_logits"] > 1e-2 > whole.activation_error["embeddings"]
    for of in ("float", "dequantized"):
        assert vectors[of].keys() == wanted[of].keys()
        for vector, values in wanted[of].items():
            np.testing.assert_array_equal(vectors[of][vector], values)
    assert (wanted["float"]["tiny.first_logits"] != wanted["dequantized"]["tiny.first_logits"]).any()


def test_a_head_that_is_the_embedding_table(tmp_path: Path) -> None:
    vlm = random_vlm()
    vlm.config.text_config.tie_word_embeddings = True
    vlm.tie_head()
    save_checkpoint(vlm, tmp_path / "tied", read_processing(STUDENT))
    streamed = open_streamed(tmp_path / "tied")
    rows = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(streamed.vlm.lm_head(rows), vlm.lm_head(rows))


def test_memory_holds_a_layer_or_a_table_and_not_the_model() -> None:
    vlm = random_vlm(hidden=128, feed_forward=512)
    layers = len(vlm.language_model.layers)
    counted = Counted({name: weight.clone() for name, weight in vlm.state_dict().items()})
    with torch.device("meta"):
        skeleton = MobileVlm(vlm.config).eval()
    model = LoadedModel(skeleton, counted)
    rows = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    layer = model.vlm.language_model.layers[0]
    sizes = {name: parameter.numel() * 4 for name, parameter in layer.named_parameters()}
    with torch.no_grad():
        hidden = model.vlm.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        wanted = vlm.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden, wanted)
        assert counted.reads == layers * len(sizes) + 1  # and the last norm
        assert model.buffer_bytes < sum(sizes.values())  # one module at a time; equal shapes share a buffer
        with model.held(layer):
            assert not any(parameter.is_meta for parameter in layer.parameters())
            before = counted.reads
            angles = model.vlm.language_model.rotary_emb(rows, torch.arange(5)[None])
            for _ in range(3):
                layer(rows, position_embeddings=angles)
            assert counted.reads == before
        with model.held(model.vlm.language_model.layers[1]):
            assert model.buffer_bytes == sum(sizes.values())
    assert model.buffer_bytes < sum(weight.nbytes for weight in counted.weights.values()) / 2
    assert all(parameter.is_meta for parameter in model.vlm.parameters())


def test_a_failing_forward_pass_lets_the_weights_go() -> None:
    model = open_streamed(STUDENT)
    with pytest.raises(RuntimeError):
        model.vlm.lm_head(torch.zeros(1, 3))
    with pytest.raises(RuntimeError), model.held(model.vlm.language_model.layers[0]):
        model.vlm.language_model.layers[0].mlp(torch.zeros(1, 3))
    assert all(parameter.is_meta for parameter in model.vlm.parameters())


def test_opening_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    vlm, stored = open_checkpoint(STUDENT)
    load = type(stored["lm_head.weight"]).load

    def counting(weight: object) -> torch.Tensor:
        reads.append("")
        return load(weight)  # type: ignore[arg-type]

    monkeypatch.setattr(type(stored["lm_head.weight"]), "load", counting)
    model = open_streamed(STUDENT)
    assert reads == [] and vlm.state_dict().keys() == stored.keys()
    assert model.weights["lm_head.weight"].dtype == torch.float16 and len(reads) == 1
