"""State-dict name -> the graph that reads this weight; what stands behind the tower's selected layers is in none."""

from __future__ import annotations

import re

from bundle.manifest import GraphName
from distill.models.mobilevlm import MobileVlm

EMBEDDING = "language_model.embed_tokens.weight"

UNREAD_PARTS = {"post_layernorm", "head"}  # of the tower, behind its layers; SigLIP's head pools for classification
UNREAD = tuple(f"vision_tower.{part}." for part in sorted(UNREAD_PARTS))
TOWER_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")


def graph_of(weight: str, vlm: MobileVlm) -> GraphName | None:
    """The graph that reads a weight, or None for those behind the tower's selected layer."""
    layer = TOWER_LAYER.match(weight)
    if weight.startswith(UNREAD) or (layer and int(layer[1]) >= vlm.config.tower_layers):
        return None
    if weight == EMBEDDING:
        return "token_embedding"
    return "vision_encoder" if weight.startswith(("vision_tower.", "projector.")) else "text_decoder"
