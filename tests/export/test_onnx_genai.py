"""Stock onnxruntime-genai opens a bundle and answers token for token as our runtime does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bundle.golden import GoldenCase, Recording, read_golden
from bundle.manifest import Manifest, read_manifest
from bundle.prompt import splice, text_ids
from bundle.runtimes.registry import open_runtime
from bundle.tokenizer import open_tokenizer
from export.frame import ExportJob, export_bundle
from tests.export.conftest import Exported, HfCheckpoint

TOKENS = 12
TEXTS = ("A chat between a curious user.", "\nYes/no?", "  two  spaces ", "héllo ☃ 你好 😀", "x=1;y=22", "ASSISTANT:")
genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (alignkd[dev])")


def genai_answer(model: Any, manifest: Manifest, golden: Recording, case: GoldenCase) -> list[int]:
    """Greedy tokens of the stock runner, fed as its documentation has it."""
    image_id, visual = manifest.tokenizer.image_token_id, manifest.model.visual_tokens
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=manifest.model.context_length, do_sample=False)
    generator = genai.Generator(model, parameters)
    if case.image is not None:
        tensors = genai.NamedTensors()
        tensors["pixel_values"] = golden.vector(case, "pixels")
        tensors["num_image_tokens"] = np.array([visual], np.int64)
        generator.set_inputs(tensors)
    ids = [i for token in case.token_ids for i in ([image_id] * visual if token == image_id else [token])]
    generator.append_tokens(np.array([ids], np.int32))
    answer = []
    while len(answer) < TOKENS and not generator.is_done():
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    return answer


def our_answer(bundle: Path, manifest: Manifest, golden: Recording, case: GoldenCase) -> list[int]:
    runtime, image_id = open_runtime(bundle, manifest, threads=1), manifest.tokenizer.image_token_id
    visual = None if case.image is None else runtime.encode_image(golden.vector(case, "pixels"))
    rows = splice(case.token_ids, image_id, runtime.embed(np.array([text_ids(case.token_ids, image_id)])), visual)
    answer: list[int] = []
    while len(answer) < TOKENS and (not answer or answer[-1] not in manifest.tokenizer.eos_ids):
        answer.append(int(runtime.decode(rows).argmax()))
        rows = runtime.embed(np.array([answer[-1:]]))
    runtime.close()
    return answer


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_answers_are_the_same_with_and_without_an_image(exported: Exported, precision: Any) -> None:
    bundle = exported("onnx", precision)
    manifest = read_manifest(bundle)
    golden, model = read_golden(bundle, manifest), genai.Model(str(bundle))
    for case in golden.cases:
        answer = genai_answer(model, manifest, golden, case)
        assert len(answer) == TOKENS or answer[-1] in manifest.tokenizer.eos_ids
        assert answer == our_answer(bundle, manifest, golden, case), case.name


@pytest.mark.parametrize(("text", "tower"), [("llama", "clip_vision_model"), ("qwen2", "siglip_vision_model")])
def test_hugging_face_llava_answers_too(text: str, tower: str, hf_checkpoint: HfCheckpoint, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    export_bundle(ExportJob(hf_checkpoint(text, tower), "onnx", "int4", bundle), progress=lambda line: None)
    manifest, model = read_manifest(bundle), genai.Model(str(bundle))
    golden, theirs = read_golden(bundle, manifest), genai.Tokenizer(model)
    for case in golden.cases:
        answer = genai_answer(model, manifest, golden, case)
        assert len(answer) == TOKENS or answer[-1] in manifest.tokenizer.eos_ids
        assert answer == our_answer(bundle, manifest, golden, case), case.name
    if text == "qwen2":  # of a LLaMA's pieces it splits punctuation off: "T:" of "ASSISTANT:" is two of them there
        ours = open_tokenizer(manifest.tokenizer, bundle)
        assert all(theirs.encode(words).tolist() == ours.encode(words) for words in TEXTS)


def test_its_tokenizer_gives_our_ids(exported: Exported) -> None:
    bundle = exported("onnx", "int4")
    ours = open_tokenizer(read_manifest(bundle).tokenizer, bundle)
    theirs = genai.Tokenizer(genai.Model(str(bundle)))
    for text in TEXTS:
        assert theirs.encode(text).tolist() == ours.encode(text), text


def test_no_weight_is_stored_twice(exported: Exported) -> None:
    folder = exported("onnx", "int4") / "onnx"
    plain, with_image = (
        onnx.load(folder / f"{stem}_q4.onnx", load_external_data=False)
        for stem in ("embed_tokens", "embed_tokens_genai")
    )
    shared = {tensor.name: tensor for tensor in plain.graph.initializer}
    added = [tensor for tensor in with_image.graph.initializer if tensor.name not in shared]
    assert all(tensor == shared[tensor.name] for tensor in with_image.graph.initializer if tensor.name in shared)
    assert all(len(tensor.raw_data) <= 16 and not tensor.external_data for tensor in added)


def test_the_config_names_files_of_the_bundle(exported: Exported) -> None:
    bundle = exported("onnx", "int4")
    manifest, config = read_manifest(bundle), json.loads((bundle / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == manifest.model.context_length
    for part in ("decoder", "vision", "embedding"):
        assert config["model"][part]["filename"] in manifest.files
    assert {"genai_config.json", "tokenizer.json", "tokenizer_config.json"} <= manifest.files.keys()
