"""Checkpoint, calibration data, other data -> what 4-bit codes of each method lose on the other data, as a table.

    python benchmarks/quantization.py CHECKPOINT --calibration train.json --held-out test.json

Weights alone, in torch: the codes that each target's packer would store, activations in float32. Every weight that the
int4 recipe puts at 4 bits is replaced, everything else is the checkpoint's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from distill.models.processing import read_processing
from export.model.streamed import LoadedModel, open_streamed
from export.quantize.calibration import Calibration, CalibrationData, read_calibration
from export.quantize.methods import Method
from export.quantize.search import choose_codes
from export.quantize.sensitivity import Sensitivity
from export.weights.blocks import pack, unpack
from export.weights.chosen import ChosenWeights
from export.weights.dequantized import RoundedWeights
from export.weights.plan import StoragePlan
from export.weights.recipe import Storage, storage_of

GROUP = 32
Weights = Mapping[str, torch.Tensor]


def by_onnx(weight: torch.Tensor) -> torch.Tensor:
    """Rounding to nearest as the ONNX packer does it."""
    return torch.from_numpy(unpack(pack(weight.numpy(), 4, GROUP)))


def by_torchao(weight: torch.Tensor) -> torch.Tensor:
    """As torchao does it for ExecuTorch, scales in bfloat16."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    int4: torch.dtype = vars(torch)["int4"]
    quantize_(linear, Int8DynamicActivationIntxWeightConfig(int4, PerGroup(GROUP), weight_scale_dtype=torch.bfloat16))
    return linear.weight.dequantize().float()


def by_coremltools(weight: torch.Tensor) -> torch.Tensor:
    """As coremltools does it: the largest magnitude takes the level 7, scales in float16."""
    groups = weight.reshape(-1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float().clamp_min(2.0**-24)
    return ((groups / scales).round().clamp(-7, 7) * scales).reshape(weight.shape)


ROUNDINGS = {"rtn, onnx": by_onnx, "rtn, executorch": by_torchao, "rtn, coreml": by_coremltools}


def cases(
    model: LoadedModel, storages: Mapping[str, Storage], calibration: Calibration, folder: Path
) -> Iterator[tuple[str, Weights, float]]:
    """Name, weights and seconds of each way to quantize."""
    shapes = {name: tuple(weight.shape) for name, weight in model.vlm.state_dict().items()}
    eight = StoragePlan("onnx", "int8")
    wide = [name for name, shape in shapes.items() if eight.storage(name, shape).bits == 8]
    rounded = RoundedWeights(model.weights, eight)
    yield "int8", {name: rounded[name] for name in wide}, 0.0
    for name, rounding in ROUNDINGS.items():
        start = time.monotonic()
        yield name, {one: rounding(model.weights[one].float()) for one in storages}, time.monotonic() - start
    chosen: tuple[tuple[str, Method, bool], ...] = (
        ("hqq, all targets", "hqq", False),
        ("gptq, executorch and coreml", "gptq", False),
        ("gptq, onnx", "gptq", True),
    )
    for number, (name, method, signed) in enumerate(chosen):
        start = time.monotonic()
        codes = ChosenWeights(folder / str(number))
        choose_codes(model, storages, method, calibration, codes, signed, lambda line: None)
        yield name, codes, time.monotonic() - start


def main(words: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--held-out-rows", type=int, default=400)
    given = parser.parse_args(words)
    model, processing = open_streamed(given.checkpoint), read_processing(given.checkpoint)
    config = model.vlm.config
    length = int(config.text_config.max_position_embeddings)
    calibration, held_out = (
        read_calibration(CalibrationData(data, rows=rows), processing, config, length)
        for data, rows in ((given.calibration, given.calibration_rows), (given.held_out, given.held_out_rows))
    )
    shapes = {name: tuple(weight.shape) for name, weight in model.vlm.state_dict().items()}
    found = {name: storage_of(name, shape, "int4") for name, shape in shapes.items()}
    storages = {name: storage for name, storage in found.items() if storage.bits == 4}
    sensitivity = Sensitivity(model, held_out.conversations)
    sys.stdout.write("| codes | KL, nats per answer token | answers changed, % | seconds |\n|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, weights, seconds in cases(model, storages, calibration, Path(folder)):
            loss = sensitivity.of_weights(weights)
            sys.stdout.write(f"| {name} | {loss.kl:.2e} | {loss.flips_percent:.1f} | {seconds:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
