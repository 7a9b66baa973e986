"""A MobileVLM V2 1.7B-shaped checkpoint through alignkd-export: memory, verdict, and the stock runner's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle.golden import read_golden
from bundle.manifest import read_manifest
from bundle.runtimes.contract import Floats, Runtime
from bundle.runtimes.registry import open_runtime
from tests.export.stock_runner import pieces_of, stock_answer
from tests.export.test_onnx_genai import TOKENS, genai, genai_answer, our_answer

ROOT = Path(__file__).parents[2]
PEAK_BYTES = {"onnx": 8 * 10**9, "executorch": 8 * 10**9, "coreml": 18 * 10**9}


def command(name: str, *arguments: str | Path) -> str:
    """Run one of our commands or scripts -> its last line on stdout."""
    program = [sys.executable, name] if name.endswith(".py") else [Path(sys.executable).parent / name]
    ran = subprocess.run(
        [*program, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1] if ran.stdout else ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "mobilevlm-1.7b"
    command("scripts/make_real_size_checkpoint.py", "--output", folder)
    return folder


def exported(checkpoint: Path, target: str, bundle: Path) -> Path:
    """The checkpoint's int4 bundle, made within the memory that is promised, and verified by the command."""
    made = json.loads(command("alignkd-export", checkpoint, "--target", target, "--int4", "--output", bundle, "--json"))
    assert made["peak_memory_bytes"] < PEAK_BYTES[target]
    assert json.loads(command("alignkd-verify", bundle, "--json"))["ok"]
    return bundle


@pytest.mark.slow
def test_onnx_int4(checkpoint: Path, tmp_path: Path) -> None:
    bundle = exported(checkpoint, "onnx", tmp_path / "bundle")
    manifest = read_manifest(bundle)
    golden, model = read_golden(bundle, manifest), genai.Model(str(bundle))
    for case in golden.cases:
        assert genai_answer(model, manifest, golden, case) == our_answer(bundle, manifest, golden, case), case.name


@pytest.mark.slow
def test_executorch_int4(checkpoint: Path, tmp_path: Path) -> None:
    bundle = exported(checkpoint, "executorch", tmp_path / "bundle")
    manifest = read_manifest(bundle)
    golden, tokenizer = read_golden(bundle, manifest), bundle / manifest.tokenizer.path
    with_image = [case for case in golden.cases if case.image is not None]
    assert len(with_image) == 3
    for case in with_image:
        at = case.token_ids.index(manifest.tokenizer.image_token_id)
        before, after = list(case.token_ids[:at]), list(case.token_ids[at + 1 :])
        pixels = golden.vector(case, "pixels")
        ours = segmented_answer(open_runtime(bundle, manifest, threads=2), before, pixels, after)
        theirs = stock_answer(
            bundle / "model.pte", tokenizer, torch.from_numpy(pixels), before, after, TOKENS, tmp_path
        )
        ends = [n for n, token in enumerate(ours) if token in manifest.tokenizer.eos_ids]
        ours = ours[: ends[0]] if ends else ours
        assert len(set(ours)) > 1 and theirs[: len(ours)] == pieces_of(tokenizer, ours), case.name


@pytest.mark.slow
def test_coreml_int4(checkpoint: Path, tmp_path: Path) -> None:
    bundle = exported(checkpoint, "coreml", tmp_path / "bundle")
    assert sorted(path.name for path in bundle.glob("*.mlpackage")) == [
        "text_decoder.mlpackage",
        "token_embedding.mlpackage",
        "vision_encoder.mlpackage",
    ]


def segmented_answer(runtime: Runtime, before: list[int], pixels: Floats, after: list[int]) -> list[int]:
    """Greedy tokens, the prompt fed as the stock runner feeds it: text, image, text.

    In one piece its sums are in another order; logits of random weights lie so close that the tokens part.
    """
    for rows in (runtime.embed(np.array([before])), runtime.encode_image(pixels), runtime.embed(np.array([after]))):
        logits = runtime.decode(rows)
    answer = []
    for _ in range(TOKENS):
        answer.append(int(logits.argmax()))
        logits = runtime.decode(runtime.embed(np.array([answer[-1:]])))
    runtime.close()
    return answer
