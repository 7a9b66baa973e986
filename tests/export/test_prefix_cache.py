"""--prefix-cache: the same answers with fewer rows computed; a verifier that sees a wrong cache; what it is worth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundle.errors import UsageError
from bundle.manifest import file_records, read_manifest, write_manifest
from bundle.prefix import known_rows, read_rows
from bundle.runtimes.registry import open_runtime
from bundle.session import Answer, Vlm, open_bundle
from bundle.verify import verify_bundle
from export.frame import ExportJob, export_bundle
from tests.export.conftest import CONTEXT, STUDENT, Command


@pytest.fixture(scope="module", params=["float32", "float16"])
def cached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference student at int4 with a prefix cache, its KV cache in either type; read it, never change it."""
    output = tmp_path_factory.mktemp("prefix") / "bundle"
    job = ExportJob(STUDENT, "onnx", "int4", output, CONTEXT, prefix_cache=True)
    if request.param == "float16":
        job = replace(job, onnx=replace(job.onnx, fp16_cache=True))
    export_bundle(job, progress=lambda line: None)
    return output


def answers(bundle: Path, change: Callable[[Vlm], None]) -> list[Answer]:
    """Three questions to one opened bundle, so that each finds the cache of the one before; the second has no image."""
    image = next(path for path in sorted((bundle / "golden").glob("*.png")))
    with open_bundle(bundle, threads=1) as vlm:
        change(vlm)
        asked = ((image, "What is it?"), (None, "Is it red?"), (image, "Where is the circle?"))
        return [vlm.generate(picture, question, max_new_tokens=6) for picture, question in asked]


def forget(vlm: Vlm) -> None:
    vlm.manifest = vlm.manifest.model_copy(update={"prefix_cache": None})


def test_answers_are_the_same_and_the_prefix_is_not_computed(cached: Path) -> None:
    prefix = read_manifest(cached).prefix_cache
    assert prefix is not None
    with_cache, without = answers(cached, lambda vlm: None), answers(cached, forget)
    assert [a.token_ids for a in with_cache] == [a.token_ids for a in without]
    assert [a.times.known_tokens for a in without] == [0, 0, 0]
    known = [a.times.known_tokens for a in with_cache]
    assert known[0] == known[2] == len(prefix.token_ids)
    assert len(prefix.token_ids) - 1 <= known[1]  # a tokenizer may join the last blank with the question's first word
    assert [a.times.prompt_tokens for a in with_cache] == [a.times.prompt_tokens for a in without]


def test_the_verifier_finds_the_cache_equal_to_a_fresh_prefill(cached: Path) -> None:
    (verdict,) = verify_bundle(cached)
    assert verdict.problem is None and verdict.prefix is not None and verdict.prefix.ok
    assert verdict.prefix.cache_error < 1e-5 and verdict.prefix.logits_error < 1e-3


def test_a_bundle_without_its_decoder_opens(cached: Path) -> None:
    manifest = read_manifest(cached)
    vision = manifest.model_copy(update={"graphs": {"vision_encoder": manifest.graphs["vision_encoder"]}})
    runtime = open_runtime(cached, vision, threads=1)
    size = manifest.image.size
    visual = runtime.encode_image(np.zeros((1, 3, size, size), np.float32))
    assert visual.shape == (1, manifest.model.visual_tokens, manifest.model.hidden_size)
    runtime.close()


def moved_by_a_row(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=2)


def of_another_head(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=1)


@pytest.mark.parametrize("fault", [moved_by_a_row, of_another_head])
@pytest.mark.parametrize("tensor", ["past_key_values.0.key", "past_key_values.1.value"])
def test_the_verifier_sees_a_wrong_cache(
    cached: Path, tmp_path: Path, fault: Callable[[np.ndarray], np.ndarray], tensor: str
) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(cached, bundle)
    manifest = read_manifest(bundle)
    assert manifest.prefix_cache is not None
    path = bundle / manifest.prefix_cache.path
    rows = load_file(path)
    save_file({name: np.ascontiguousarray(fault(v)) if name == tensor else v for name, v in rows.items()}, path)
    write_manifest(bundle, manifest.model_copy(update={"files": file_records(bundle)}))
    (verdict,) = verify_bundle(bundle)
    assert verdict.diagnosis is None and verdict.problem is not None
    assert verdict.problem.startswith("prefix cache of ") and tensor in verdict.problem


def test_a_damaged_file_is_one_line(cached: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(cached, bundle)
    manifest = read_manifest(bundle)
    assert manifest.prefix_cache is not None
    path = bundle / manifest.prefix_cache.path
    rows = load_file(path)
    save_file({name: v[:, :, :3].copy() for name, v in rows.items()}, path)
    with pytest.raises(UsageError, match=r"past_key_values.* must be float.*found float.*export again"):
        read_rows(bundle, manifest)
    path.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        read_rows(bundle, manifest)


def test_known_rows_are_the_common_beginning_and_leave_one_to_compute(cached: Path) -> None:
    manifest = read_manifest(cached)
    assert manifest.prefix_cache is not None
    ids = manifest.prefix_cache.token_ids
    assert known_rows(manifest, (*ids, -200, 7)) == len(ids)
    assert known_rows(manifest, ids) == len(ids) - 1
    assert known_rows(manifest, (*ids[:3], ids[3] + 1, 9, 9)) == 3
    assert known_rows(manifest, (ids[0] + 1, *ids[1:])) == 0
    assert known_rows(manifest.model_copy(update={"prefix_cache": None}), ids) == 0


@pytest.mark.parametrize("target,why", [("executorch", "by prefill alone"), ("coreml", "no app of ours does yet")])
def test_other_targets_refuse_it(run_export: Command, tmp_path: Path, target: str, why: str) -> None:
    ran = run_export(STUDENT, "--target", target, "--prefix-cache", "--output", tmp_path / "b")
    assert ran.code == 2 and "--prefix-cache is for --target onnx" in ran.error and why in ran.error
    assert not (tmp_path / "b").exists()
