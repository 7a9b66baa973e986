"""Flags of ``alignkd-distill init`` -> the sizes of a fresh student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InitConfig:
    """Sizes of a fresh student that sees through its teacher's tower."""

    teacher: Path
    """Checkpoint that gives tower, vocabulary and processing."""
    output: Path
    """New directory for the student checkpoint."""
    hidden_size: int
    """Width of the decoder."""
    layers: int
    """Decoder layers."""
    heads: int
    """Attention heads."""
    intermediate_size: int
    """Width inside the decoder's MLPs."""
    seed: int = 0
    """Of the initial weights."""
