"""LLaMA folder and MobileVLM checkpoint -> OpenVINO files by its own tools.

    python to_openvino.py LLAMA CHECKPOINT OUTPUT      in an environment with optimum-intel, and PYTHONPATH at alignkd

The decoder by optimum-intel with NNCF's int4 weights (symmetric, groups of 32, every layer; head and embedding int8,
its default); the vision encoder traced from alignkd's torch module, int8 by NNCF's post-training quantization.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nncf
import openvino
import torch

from distill.models.checkpoint import load_vlm

CALIBRATION = 4  # pictures of noise: the weights are random


class VisionEncoder(torch.nn.Module):
    """pixel_values [1, 3, S, S] -> visual tokens [1, N, D]."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.vlm = load_vlm(checkpoint).eval()
        self.size = self.vlm.config.vision_config.image_size
        del self.vlm.language_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vlm.encode_images(pixel_values)


def write_text(llama: Path, output: Path) -> None:
    """The stateful decoder, by the command that a user would type."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(llama)]
    command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "32"]
    subprocess.run([*command, "--ratio", "1.0", str(output)], check=True)


def write_vision(checkpoint: Path, output: Path) -> None:
    """vision.xml, int8."""
    encoder = VisionEncoder(checkpoint)
    size = encoder.size
    with torch.no_grad():
        model = openvino.convert_model(encoder, example_input=torch.randn(1, 3, size, size), input=[1, 3, size, size])
    del encoder
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(1, 3, size, size, generator=generator).numpy() for _ in range(CALIBRATION)]
    quantized = nncf.quantize(
        model, nncf.Dataset(pictures), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION
    )
    openvino.save_model(quantized, output / "vision.xml")


def main(llama: Path, checkpoint: Path, output: Path) -> None:
    """Write text/ and vision.xml."""
    output.mkdir(parents=True)
    write_vision(checkpoint, output)
    write_text(llama, output / "text")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
