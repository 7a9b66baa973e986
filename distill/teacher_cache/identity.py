"""Teacher checkpoint, processing, settings -> identities: what must be equal for two recordings to be the same one."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bundle.staging import sha256_of
from distill.models.checkpoint import PUBLISHED_ARCHITECTURES, read_json, tower_directory, weight_files
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.models.roles import tower_hash

KEY_BYTES = 16
Identity = dict[str, Any]  # JSON values; its canonical text is hashed
# where a checkpoint came from and who wrote it, not what it computes
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "mm_vision_tower", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher by what it is, not by where it lies; enough to train from its recording when it is elsewhere.

    Attributes:
        sha256: of config and weights.
        tower_sha256: ``tower_hash``.
        heads, width, layers: of its decoder.
        visual_tokens: per image.
        vocabulary: rows of its lm_head.
        tokenizer_sha256: of tokenizer.model, or tokenizer.json of a LLaVA.
    """

    sha256: str
    tower_sha256: str
    heads: int
    width: int
    layers: int
    visual_tokens: int
    vocabulary: int
    tokenizer_sha256: str


def facts_of(teacher: MobileVlm, folder: Path, processing: Processing) -> TeacherFacts:
    """The facts of a loaded teacher."""
    text = teacher.config.text_config
    return TeacherFacts(
        sha256=checkpoint_sha256(folder),
        tower_sha256=tower_hash(teacher),
        heads=int(text.num_attention_heads or 0),
        width=int(text.hidden_size or 0),
        layers=int(text.num_hidden_layers or 0),
        visual_tokens=teacher.config.visual_tokens,
        vocabulary=int(text.vocab_size or 0),
        tokenizer_sha256=sha256_of(processing.tokenizer_path),
    )


def checkpoint_sha256(folder: Path) -> str:
    """SHA-256 over config and every tensor's name, shape and bytes: how they are spread over files does not matter."""
    config = read_json(folder / "config.json", folder)
    folders = [folder]
    if (config.get("architectures") or [""])[0] in PUBLISHED_ARCHITECTURES and (
        tower := tower_directory(folder, config)
    ):
        folders.append(tower)
    digest = hashlib.sha256(_canonical(_without_origin(config)))
    for place in folders:
        where: dict[str, Path] = {}
        for file in weight_files(place):
            with safe_open(file, framework="pt") as opened:
                where |= {name: file for name in opened.keys()}
        for name in sorted(where):
            with safe_open(where[name], framework="pt") as opened:
                tensor = opened.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def processing_identity(processing: Processing) -> Identity:
    """Image spec, tokenizer and template."""
    return {
        "image": json.loads(processing.image.model_dump_json()),
        "tokenizer": sha256_of(processing.tokenizer_path),
        "special_tokens": json.loads(processing.tokenizer.model_dump_json()),
        "template": json.loads(processing.prompt.model_dump_json()),
        "turns": None if processing.turns is None else asdict(processing.turns),
    }


def identity_hash(identity: Identity) -> str:
    """SHA-256 of the canonical text."""
    return hashlib.sha256(_canonical(identity)).hexdigest()


def sample_digest(input_ids: Sequence[int], labels: Sequence[int], image: bytes | None) -> bytes:
    """A conversation by its ids, its labels and the hash of its image's bytes."""
    digest = hashlib.sha256(struct.pack("<q", len(input_ids)))
    digest.update(np.asarray(input_ids, "<i8").tobytes() + np.asarray(labels, "<i8").tobytes())
    digest.update(image or b"")
    return digest.digest()


def entry_key(part: str, content: bytes) -> bytes:
    """The key of an entry: a part's identity hash and the digest of the sample or image."""
    return hashlib.sha256(part.encode() + content).digest()[:KEY_BYTES]


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    plain = {}
    for name, value in config.items():
        if name not in NOT_THE_MODEL:
            plain[name] = _without_origin(value) if isinstance(value, dict) else value
    return plain


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
