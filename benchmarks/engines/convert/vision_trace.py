"""A MobileVLM checkpoint -> its vision encoder as a TorchScript file, which other tools convert without our modules.

python vision_trace.py CHECKPOINT OUTPUT      in alignkd's environment
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from distill.models.checkpoint import open_checkpoint
from distill.models.mobilevlm import MobileVlm


class VisionEncoder(torch.nn.Module):
    """pixel_values [1, 3, S, S] -> visual tokens [1, N, D]."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        skeleton, weights = open_checkpoint(checkpoint)
        with no_init_weights():
            self.vlm = MobileVlm(skeleton.config).eval()
        del self.vlm.language_model, self.vlm.lm_head
        mine = {name: weights[name].load().float() for name in self.vlm.state_dict()}
        self.vlm.load_state_dict(mine, assign=True)
        self.size = self.vlm.config.vision_config.image_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vlm.encode_images(pixel_values)


def write_vision(checkpoint: Path, output: Path) -> None:
    """Trace on a picture of noise and save."""
    output.mkdir(parents=True)
    encoder = VisionEncoder(checkpoint)
    with torch.no_grad():
        traced = torch.jit.trace(encoder, torch.randn(1, 3, encoder.size, encoder.size))
    torch.jit.save(traced, output / "vision.pt")
    (output / "shape.json").write_text(json.dumps([1, 3, encoder.size, encoder.size]), encoding="utf-8")


if __name__ == "__main__":
    write_vision(Path(sys.argv[1]), Path(sys.argv[2]))
