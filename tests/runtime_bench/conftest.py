"""A real ONNX bundle of a tiny random model: the product's own graphs, without golden vectors, which cost seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bench_rows import CONTEXT, HEADS, LAYERS, TOKENIZER_MODEL, WIDTH, manifest_of

from bundle.manifest import file_records, write_manifest


@pytest.fixture(scope="session")
def made_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the session; do not change it."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
    from export.contract import ExportRequest
    from export.targets import load_exporter

    folder = tmp_path_factory.mktemp("bench") / "bundle"
    folder.mkdir()
    shutil.copyfile(TOKENIZER_MODEL, folder / "tokenizer.model")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=512,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    vlm = MobileVlm(MobileVlmConfig(text_config=text, vision_config=vision)).eval()
    exported = load_exporter("onnx")(
        ExportRequest(
            vlm=vlm,
            precision="fp32",
            context_length=CONTEXT,
            tokenizer_path=TOKENIZER_MODEL,
            eos_ids=(2,),
            bos_id=1,
            output=folder,
            progress=lambda line: None,
        )
    )
    manifest = manifest_of(512, graphs=exported.graphs, quantization=exported.quantization, files=file_records(folder))
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def bundle(made_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(made_bundle, tmp_path / "bundle"))
