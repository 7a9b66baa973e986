"""What an export records about the model: golden vectors, quantization error, sensitivity and tolerances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundle.golden import GREEDY_TOKENS, read_golden
from bundle.manifest import Precision, read_manifest
from bundle.prompt import splice
from bundle.replay import relative_error, replay
from bundle.runtimes.registry import open_runtime
from bundle.tokenizer import open_tokenizer
from distill.models.checkpoint import load_vlm
from distill.models.processing import read_processing
from export.golden.record import picture, probes
from export.golden.rounding import as_it_is, int8_per_block, int8_per_token, int8_with_zero_point, rounded_activations
from tests.export.conftest import STUDENT, Exported
from tests.export.models import random_vlm
from tests.export.one_by_one import forced_errors, run_forced, run_stages


def student_probes() -> list:
    processing = read_processing(STUDENT)
    return probes(processing, open_tokenizer(processing.tokenizer, STUDENT))


def test_golden_vectors_are_what_torch_computes(exported: Exported) -> None:
    bundle = exported("onnx", "fp32")
    golden, vlm = read_golden(bundle, read_manifest(bundle)), load_vlm(STUDENT)
    case = next(case for case in golden.cases if case.name == "wide")
    pixels = torch.from_numpy(golden.vector(case, "pixels"))
    ids = torch.tensor([case.token_ids])
    with torch.no_grad():
        logits = vlm.logits(ids, torch.ones_like(ids), pixels)[0, -1].numpy()
    assert relative_error(golden.vector(case, "first_logits"), logits) < 1e-5
    assert vlm.greedy(ids, pixels, GREEDY_TOKENS) == list(case.greedy_ids)


def test_cases_cover_odd_pictures_and_text_alone(exported: Exported) -> None:
    bundle = exported("onnx", "fp32")
    cases = read_golden(bundle, read_manifest(bundle)).cases
    assert [case.image is None for case in cases] == [False, False, False, True]
    assert all(len(case.greedy_ids) == GREEDY_TOKENS for case in cases)
    assert np.array_equal(picture("wide"), picture("wide")) and picture("tall").size == (45, 98)


def test_onnx_fp32_gives_the_greedy_tokens_of_torch(exported: Exported) -> None:
    bundle = exported("onnx", "fp32")
    manifest = read_manifest(bundle)
    golden, runtime = read_golden(bundle, manifest), open_runtime(bundle, manifest, threads=1)
    for case in golden.cases:
        image = None if case.image is None else runtime.encode_image(golden.vector(case, "pixels"))
        runtime.reset()
        text = np.array([[i for i in case.token_ids if i != manifest.tokenizer.image_token_id]])
        logits = runtime.decode(splice(case.token_ids, manifest.tokenizer.image_token_id, runtime.embed(text), image))
        ids = []
        for _ in range(GREEDY_TOKENS):
            ids.append(int(logits.argmax()))
            logits = runtime.decode(runtime.embed(np.array([[ids[-1]]])))
        assert tuple(ids) == case.greedy_ids
    runtime.close()


@pytest.mark.parametrize("precision,floor", [("fp32", 1e-4), ("int4", 1e-2)])
def test_the_manifest_records_errors_below_their_tolerances(
    exported: Exported, precision: Precision, floor: float
) -> None:
    manifest = read_manifest(exported("onnx", precision))
    assert manifest.parity is not None
    tolerances = manifest.golden.tolerances[manifest.parity.family]
    for stage, parity in manifest.parity.graph_error.items():
        assert parity.relative_error <= parity.tolerance == tolerances[stage]
    assert tolerances["first_logits"] >= floor
    quantization, total = manifest.parity.quantization_error, manifest.parity.total_error
    assert (quantization["first_logits"] > 1e-2) == (precision == "int4")
    for stage, tolerance in manifest.golden.quantization_tolerances.items():
        assert quantization[stage] <= tolerance
        graph = manifest.parity.graph_error[stage].relative_error
        assert total[stage] <= (quantization[stage] + graph * (1 + quantization[stage])) * 1.001, "the triangle"


def test_replay_finds_a_runtime_that_forgets_its_cache(exported: Exported) -> None:
    bundle = exported("onnx", "fp32")
    manifest = read_manifest(bundle)
    runtime = open_runtime(bundle, manifest, threads=1)
    decode = runtime.decode

    def forgetful(rows: np.ndarray) -> np.ndarray:
        runtime.reset()
        return decode(rows)

    runtime.decode = forgetful  # type: ignore[method-assign]
    errors = replay(runtime, manifest, read_golden(bundle, manifest), manifest.golden.tolerances["x86_64-vnni"]).graph
    assert errors["first_logits"].error < 1e-4 < errors["greedy_tokens"].error


def test_forced_decoding_in_one_pass_equals_decoding_with_a_cache() -> None:
    vlm, questions = load_vlm(STUDENT), student_probes()[-1:]
    stepwise = run_stages(vlm, questions[0])
    forced = run_forced(vlm, questions[0], stepwise.fed_ids)
    assert relative_error(forced.greedy_logits, stepwise.greedy_logits) < 1e-5
    assert max(forced_errors(vlm, questions, [stepwise]).values()) < 1e-4


def test_rounding_known_answers() -> None:
    rows = torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0]])
    assert int8_per_token(rows).tolist() == [[127.0, -64.0, 0.0], [0.0, 0.0, 0.0]]
    assert int8_with_zero_point(torch.tensor([[-50.0, 205.0, 100.4], [3.0, 2.55, 0.004]])).tolist() == [
        [-50.0, 205.0, 100.0],
        pytest.approx([3.0, 2.5529, 0.0], abs=1e-4),
    ]
    two_blocks = torch.cat([torch.full((32,), 0.25), torch.tensor([127.0, 0.6])])
    assert int8_per_block(two_blocks).tolist() == [0.25] * 32 + [127.0, 1.0]
    assert int8_per_token(two_blocks).tolist() == [0.0] * 32 + [127.0, 1.0]


def test_rounded_activations_end_with_their_block() -> None:
    vlm = random_vlm()
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vlm.encode_images(pixels)
        with rounded_activations(vlm, int8_per_token):
            rounded = vlm.encode_images(pixels)
        with rounded_activations(vlm, as_it_is):
            untouched = vlm.encode_images(pixels)
        after = vlm.encode_images(pixels)
    assert 1e-4 < relative_error(rounded.numpy(), before.numpy()) < 5e-2
    assert torch.equal(before, after) and torch.equal(before, untouched)
