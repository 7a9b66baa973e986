"""A Core AI bundle's manifest -> metadata.json and tokenizer/, by which Apple's coreai-models opens a VLM folder."""

from __future__ import annotations

import json
from pathlib import Path

from bundle.manifest import GraphName, ImageSpec, Manifest
from bundle.staging import write_text_whole
from export.model.hf_tokenizer import write_tokenizer

METADATA_FILE, METADATA_VERSION = "metadata.json", "0.2"
TOKENIZER_FOLDER = "tokenizer"
ROLES: dict[str, GraphName] = {"main": "text_decoder", "embedding": "token_embedding", "vision": "vision_encoder"}
STRATEGIES: dict[str, str] = {"pad": "pad", "crop": "center_crop", "stretch": "stretch"}


def write_stock_files(folder: Path, manifest: Manifest, tokenizer_path: Path, patch_size: int) -> None:
    """Write both beside the assets; the manifest stays what alignkd's own runners read."""
    (folder / TOKENIZER_FOLDER).mkdir()
    write_tokenizer(tokenizer_path, folder / TOKENIZER_FOLDER)
    write_text_whole(folder / METADATA_FILE, json.dumps(stock_metadata(manifest, patch_size), indent=1) + "\n")


def stock_metadata(manifest: Manifest, patch_size: int) -> dict[str, object]:
    """The content of metadata.json (schema 0.2, kind vlm)."""
    return {
        "metadata_version": METADATA_VERSION,
        "kind": "vlm",
        "name": manifest.name,
        "assets": {role: manifest.graphs[graph].path for role, graph in ROLES.items()},
        "language": {
            "tokenizer": manifest.source.name,
            "vocab_size": manifest.model.vocab_size,
            "max_context_length": manifest.model.context_length,
            "embedded_tokenizer": True,
            "function_map": {"main": ["main"]},
        },
        "vision": _vision(manifest.image, manifest, patch_size),
        "source": {"hf_model_id": manifest.source.name, "model_definition": "torch"},
    }


def _vision(image: ImageSpec, manifest: Manifest, patch_size: int) -> dict[str, object]:
    return {
        "image_size": image.size,
        "patch_size": patch_size,
        "image_token_count": manifest.model.visual_tokens,
        # the runner embeds the placeholders before it replaces them, so they must be in the vocabulary: padding is
        "image_token_id": manifest.tokenizer.pad_id,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "rescale_factor": 1.0,  # theirs comes after the division by 255
        "image_strategy": STRATEGIES[image.strategy],
        "include_image_info": False,
    }
