"""Checkpoint and target -> where a bundle comes from: the weights' digest, and the versions of what made it."""

from __future__ import annotations

import importlib.metadata
import platform
from hashlib import sha256
from pathlib import Path

from bundle.manifest import Source, Target
from bundle.staging import sha256_of
from distill.models.checkpoint import read_json, tower_directory, weight_files
from export.targets import PACKAGES

COMMON_PACKAGES = ("alignkd", "torch", "transformers", "numpy", "pillow", "sentencepiece", "tokenizers")


def source_of(checkpoint: Path) -> Source:
    """Name, architecture and digest of a checkpoint; of several weight files the digest covers theirs in order."""
    config = read_json(checkpoint / "config.json", checkpoint)
    tower = tower_directory(checkpoint, config)
    files = weight_files(checkpoint) + ([] if tower is None else weight_files(tower))
    digests = [sha256_of(file) for file in files]
    combined = digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()).hexdigest()
    return Source(name=checkpoint.resolve().name, architecture=config["architectures"][0], weights_sha256=combined)


def environment_of(target: Target) -> dict[str, str]:
    """Versions of Python, the platform and the packages that write and run a target."""
    installed = importlib.metadata.distributions()
    found = {dist.name.lower().replace("-", "_"): dist.version for dist in installed if dist.name}
    versions = {name: found[name] for name in (*COMMON_PACKAGES, *PACKAGES[target]) if name in found}
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}
