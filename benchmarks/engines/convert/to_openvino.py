"""LLaMA folder and traced vision encoder -> OpenVINO files by its own tools.

    python to_openvino.py LLAMA VISION OUTPUT      in an environment with optimum-intel

The decoder by optimum-intel with NNCF's int4 weights (symmetric, groups of 32, every layer; head and embedding int8,
its default); the vision encoder int8 by NNCF's post-training quantization.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nncf
import openvino
import torch

CALIBRATION = 4  # pictures of noise: the weights are random


def write_text(llama: Path, output: Path) -> None:
    """The stateful decoder, by the command that a user would type."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(llama)]
    command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "32"]
    subprocess.run([*command, "--ratio", "1.0", str(output)], check=True)


def write_vision(vision: Path, output: Path) -> None:
    """vision.xml, int8."""
    traced = torch.jit.load(vision / "vision.pt").eval()
    shape = json.loads((vision / "shape.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(*shape, generator=generator) for _ in range(CALIBRATION)]
    with torch.no_grad():
        model = openvino.convert_model(traced, example_input=pictures[0], input=shape)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([picture.numpy() for picture in pictures]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION,
    )
    openvino.save_model(quantized, output / "vision.xml")


def main(llama: Path, vision: Path, output: Path) -> None:
    """Write text/ and vision.xml."""
    output.mkdir(parents=True)
    write_vision(vision, output)
    write_text(llama, output / "text")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
