"""alignkd-export CHECKPOINT -> bundle directory, its path as the last line of stdout; progress on stderr."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bundle.errors import UsageError, missing_extra, run_command
from bundle.manifest import Precision, Target
from export.targets import known_target

if TYPE_CHECKING:
    from bundle.manifest import Manifest

Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class ExportConfig:
    """Export a checkpoint to one target at one precision (int4 unless another is asked for).

    Writes a bundle: three graphs, manifest, tokenizer and golden vectors. The graphs must reproduce the golden vectors
    on this host, or nothing is written. Exit code 0: done; 2: wrong input; 3: a graph is out of tolerance; 6: nothing
    on this host runs the target.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """directory with config.json, *.safetensors and tokenizer.model, by alignkd-distill or MobileVLM V2 as published"""
    target: Annotated[str, tyro.conf.arg(metavar="{executorch,coreml,onnx}")]
    """which runtime the graphs are for"""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """the bundle's directory; must not exist"""
    int4: Flag = False
    """decoder linears int4 in groups of 32, everything else int8 (the default)"""
    int8: Flag = False
    """all linears int8"""
    fp16: Flag = False
    """weights float16"""
    fp32: Flag = False
    """weights float32"""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE|auto")] = None
    """bits by weight, in place of one precision: a recipe of ours (int4, int4-head4, int8, fp16, fp32), a YAML or JSON
    file of rules, or 'auto': the bits that lose least within --budget-mb, measured on --calibration"""
    budget_mb: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """with --recipe auto: megabytes (10^6 bytes) that all weights may take together"""
    quant_method: Annotated[str | None, tyro.conf.arg(metavar="{rtn,hqq,gptq}")] = None
    """how 4-bit codes are chosen: rtn rounds to nearest, hqq searches scales, gptq makes up for errors on
    --calibration; default: gptq with --calibration, rtn without"""
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="DATA")] = None
    """conversations to calibrate on, in any format that alignkd-distill trains on"""
    calibration_images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of their images; default: where DATA lies"""
    calibration_rows: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """how many of them, taken evenly from the whole"""
    context_length: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """tokens that image, prompt and answer may take together; default: 1024, or the model's own limit if it is less"""
    int4_embedding: Flag = False
    """with --target onnx --int4: the embedding table int4 too, half its bytes at ten times its error"""
    fp16_cache: Flag = False
    """with --target onnx at int4 or int8: keys and values as float16, half their memory"""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """name in the manifest; default: CHECKPOINT-TARGET-PRECISION"""
    json: Flag = False
    """end with one line of JSON on stdout instead of the path"""


def chosen_precision(config: ExportConfig) -> Precision | None:
    """The one precision asked for, if any.

    Raises:
        UsageError: more than one was given.
    """
    flags: dict[Precision, bool] = {"int4": config.int4, "int8": config.int8, "fp16": config.fp16, "fp32": config.fp32}
    given = [precision for precision, asked in flags.items() if asked]
    if len(given) > 1:
        listed = ", ".join(f"--{precision}" for precision in given)
        raise UsageError(f"give one precision, not {len(given)} ({listed}); allowed: --int4, --int8, --fp16, --fp32")
    return given[0] if given else None


def export(config: ExportConfig) -> int:
    """Run one export and print where the bundle lies."""
    target, precision = known_target(config.target), chosen_precision(config)
    start = time.monotonic()
    manifest = _run(config, target, precision)
    if config.json:
        print(json.dumps(_as_json(config, manifest, time.monotonic() - start)))
    else:
        print(config.output)
    return 0


def _check_onnx_options(config: ExportConfig, target: Target, precision: Precision) -> None:
    """Refuse options that the target or the precision does not have.

    Raises:
        UsageError: naming the option and where it belongs.
    """
    options: tuple[tuple[str, bool, tuple[Precision, ...]], ...] = (
        ("--int4-embedding", config.int4_embedding, ("int4",)),
        ("--fp16-cache", config.fp16_cache, ("int4", "int8")),  # the float precisions promise float32 activations
    )
    for flag, asked, precisions in options:
        if asked and (target != "onnx" or precision not in precisions):
            allowed = " or ".join(f"--{name}" for name in precisions)
            raise UsageError(
                f"{flag} is for --target onnx {allowed}, not --target {target} --{precision}; leave it out"
            )


def _run(config: ExportConfig, target: Target, precision: Precision | None) -> Manifest:
    try:
        from export.contract import OnnxOptions
        from export.frame import ExportJob, export_bundle
        from export.quantize.blame import print_blame
        from export.quantize.calibration import CalibrationData
        from export.quantize.request import quantizing
    except ModuleNotFoundError as error:
        raise missing_extra((error.name or "torch").split(".")[0], target) from error
    from rich.console import Console
    from rich.markup import escape

    data = None
    if config.calibration is not None:
        data = CalibrationData(config.calibration, config.calibration_images, config.calibration_rows)
    asked = quantizing(precision, config.recipe, config.quant_method, data, config.budget_mb)
    _check_onnx_options(config, target, asked.precision)
    console, start = Console(stderr=True), time.monotonic()

    def progress(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim]  {escape(line)}", highlight=False, soft_wrap=True)

    job = ExportJob(
        config.checkpoint,
        target,
        asked.precision,
        config.output,
        config.context_length,
        config.name,
        OnnxOptions(config.int4_embedding, config.fp16_cache),
        asked,
    )
    manifest = export_bundle(job, progress)
    print_blame(config.output, console)
    progress(f"peak memory of this process {peak_memory_bytes() / (1 << 30):.2f} GiB")
    return manifest


def peak_memory_bytes() -> int:
    """The most that this process had in memory at once, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _as_json(config: ExportConfig, manifest: Manifest, seconds: float) -> dict[str, object]:
    assert manifest.parity is not None
    return {
        "bundle": str(config.output),
        "name": manifest.name,
        "target": manifest.target,
        "precision": manifest.precision,
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "runtime": manifest.parity.runtime,
        "graph_error": {stage: parity.relative_error for stage, parity in manifest.parity.graph_error.items()},
        "quantization_error": dict(manifest.parity.quantization_error),
        "total_error": dict(manifest.parity.total_error),
    }


def main() -> None:
    """Entry point of alignkd-export."""
    run_command(lambda: export(tyro.cli(ExportConfig, prog="alignkd-export")))
