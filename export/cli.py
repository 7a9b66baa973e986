"""alignkd-export CHECKPOINT -> bundle directory, its path as the last line of stdout; progress on stderr."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import tyro

from bundle.errors import UsageError, missing_extra, run_command
from bundle.manifest import Backend, Engine, Precision, Target
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
    """directory with config.json, *.safetensors and a tokenizer: by alignkd-distill, MobileVLM V2 as published, or a
    LlavaForConditionalGeneration of LLaMA or Qwen2 with CLIP or SigLIP (docs/models.md)"""
    target: Annotated[str, tyro.conf.arg(metavar="{executorch,coreml,onnx,coreai}")]
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
    """bits by weight, in place of one precision: a recipe of ours (int4, int4-head4, int4-g128, int8, fp16, fp32), a
    YAML or JSON file of rules, or 'auto': the bits that lose least within --budget-mb, measured on --calibration"""
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
    backend: Annotated[str | None, tyro.conf.arg(metavar="{xnnpack,coreml,vulkan}")] = None
    """with --target executorch: what computes the vision encoder; the decoder stays on XNNPACK (default: xnnpack)"""
    float_vision: Flag = False
    """with --target executorch at int4 or int8 on XNNPACK: the vision encoder's matrices as float32, not int8"""
    prefix_cache: Flag = False
    """with --target onnx: ship keys and values of the constant text before the image; no prompt computes them then"""
    engine: Annotated[Engine | None, tyro.conf.arg(metavar="{gpu,ane}")] = None
    """with --target coreml: gpu (the default) has dynamic sizes, ane the Neural Engine's layouts, int4 as tables"""
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


def _check_executorch_options(config: ExportConfig, target: Target, precision: Precision) -> None:
    if config.backend is not None and target != "executorch":
        raise UsageError(f"--backend is for --target executorch, not --target {target}; leave it out")
    if config.backend is not None and config.backend not in get_args(Backend):
        listed = ", ".join(get_args(Backend))
        raise UsageError(f"--backend '{config.backend}' is unknown; allowed: {listed}; run: alignkd-export --help")
    integers = precision in ("int4", "int8")
    if config.float_vision and (target != "executorch" or config.backend not in (None, "xnnpack") or not integers):
        given = f"--target {target} --{precision}" + (f" --backend {config.backend}" if config.backend else "")
        raise UsageError(
            f"--float-vision is for --target executorch --int4 or --int8 on XNNPACK, not {given}; leave it out"
        )


def _check_engine(config: ExportConfig, target: Target, precision: Precision) -> None:
    if config.engine is not None and target != "coreml":
        raise UsageError(f"--engine is for --target coreml, not --target {target}; leave it out")
    if config.engine == "ane" and precision == "fp32":
        raise UsageError("--engine ane computes in float16 and not at --fp32; use --fp16, or --engine gpu")


def _check_quantizing(config: ExportConfig, target: Target) -> None:
    """Recipes and methods speak of integers with a scale per group."""
    other = "--target coreai" if target == "coreai" else "--engine ane" if config.engine == "ane" else None
    asked = config.recipe or config.quant_method or config.calibration
    if other is not None and asked is not None:
        raise UsageError(
            f"{other} takes --int4, --int8, --fp16 or --fp32 as they are; --recipe, --quant-method and --calibration "
            "are for onnx, executorch and coreml --engine gpu: leave them out"
        )


def _run(config: ExportConfig, target: Target, precision: Precision | None) -> Manifest:
    try:
        from export.contract import CoreMlOptions, ExecutorchOptions, OnnxOptions
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
    _check_executorch_options(config, target, asked.precision)
    _check_engine(config, target, asked.precision)
    _check_quantizing(config, target)
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
        ExecutorchOptions(_known_backend(config.backend), config.float_vision),
        CoreMlOptions(config.engine or "gpu"),
        config.prefix_cache,
        asked,
    )
    manifest = export_bundle(job, progress)
    print_blame(config.output, console)
    progress(f"peak memory of this process {peak_memory_bytes() / (1 << 30):.2f} GiB")
    return manifest


def _known_backend(name: str | None) -> Backend:
    return next((backend for backend in get_args(Backend) if backend == name), "xnnpack")


def peak_memory_bytes() -> int:
    """The most that this process had in memory at once, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _as_json(config: ExportConfig, manifest: Manifest, seconds: float) -> dict[str, object]:
    parity = manifest.parity  # None of what only a device can run
    return {
        "bundle": str(config.output),
        "name": manifest.name,
        "target": manifest.target,
        "precision": manifest.precision,
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "runtime": parity and parity.runtime,
        "graph_error": parity and {stage: found.relative_error for stage, found in parity.graph_error.items()},
        "quantization_error": parity and dict(parity.quantization_error),
        "total_error": parity and dict(parity.total_error),
    }


def main(arguments: Sequence[str] | None = None, prog: str = "alignkd-export") -> None:
    """Entry point of alignkd-export, and of the same under another name; None: the process's own arguments."""
    run_command(lambda: export(tyro.cli(ExportConfig, prog=prog, args=arguments)))
