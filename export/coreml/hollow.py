"""A model's config and weights -> a MobileVlm to be traced, whose matrices are placeholders that take no memory.

Tracing and conversion need shapes. A converter that is given the weights holds several copies of them: 16 GB for the
5.4 GB of a 1.7B model. The matrices are written into the converted program afterwards (export/coreml/fill.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from export.model.graph_weights import EMBEDDING
from export.model.streamed import make_buffers

PATCHES = "vision_tower.embeddings.patch_embedding.weight"
# No value that a converter treats as something special, as it does with factors of 1 and summands of 0.
PLACEHOLDER = 0.25


def hollow(config: MobileVlmConfig, weights: Mapping[str, torch.Tensor]) -> tuple[MobileVlm, frozenset[str]]:
    """The model, and the names of the weights that are placeholders; the others have their values, as float32."""
    with torch.device("meta"):
        vlm = MobileVlm(config).eval()
    make_buffers(vlm)
    placeholders = set()
    for path, module in vlm.named_modules():
        for part, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{part}"
            if name in (EMBEDDING, PATCHES) or (isinstance(module, nn.Linear) and part == "weight"):
                placeholders.add(name)
                value = torch.full((1,), PLACEHOLDER).expand(parameter.shape)
            else:
                value = weights[name].float()
            setattr(module, part, nn.Parameter(value, requires_grad=False))
    return vlm, frozenset(placeholders)
