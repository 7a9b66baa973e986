"""Checkpoint directory -> bundle directory: export, record golden vectors, replay them here, write the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bundle.errors import UsageError, VerificationError
from bundle.golden import CASES_FILE, GREEDY_TOKENS, VECTORS_FILE, read_golden, write_golden
from bundle.manifest import (
    Golden,
    Manifest,
    Parity,
    Precision,
    Source,
    Stage,
    StageParity,
    Target,
    file_records,
    write_manifest,
)
from bundle.runtimes.registry import open_runtime
from bundle.staging import refuse_existing
from bundle.tokenizer import open_tokenizer
from bundle.verify import replay
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.models.projector import LDP_V2
from export.contract import ExportedGraphs, ExportRequest, OnnxOptions
from export.golden_lockstep import forced_errors_together, golden_work, run_stages_together
from export.golden_record import Probe, golden_case, golden_vectors, probes
from export.meter import Meter
from export.provenance import environment_of, source_of
from export.room import STREAMED, check_room, release_free_memory
from export.rounding import rounded_activations
from export.shape import model_shape
from export.streamed_model import LoadedModel, open_streamed, open_whole, weight_errors
from export.targets import load_exporter
from export.tolerances import ACTIVATIONS, stage_tolerances
from export.work_folder import work_folder

# KV cache rows when the user names no number: an image, a long question and a long answer of the six benchmarks fit,
# and a 1.7B model's float32 cache stays at 0.4 GB.
DEFAULT_CONTEXT = 1024
TOKENIZER_FILE = "tokenizer.model"
# Rounding can move a weight matrix by this much (relative L2) when its values are spread as badly as they can be;
# normal weights move by 0.1 (int4), 0.01 (int8) and 3e-4 (fp16), a matrix packed in a wrong order by 1.4.
WEIGHT_ERROR_LIMITS: dict[Precision, float] = {"int4": 0.4, "int8": 0.2, "fp16": 0.01, "fp32": 0.01}


@dataclass(frozen=True)
class ExportJob:
    """What one run of alignkd-export was asked for."""

    checkpoint: Path
    target: Target
    precision: Precision
    output: Path
    context_length: int | None = None
    name: str | None = None
    onnx: OnnxOptions = OnnxOptions()


def export_bundle(job: ExportJob, progress: Callable[[str], None]) -> Manifest:
    """Export a checkpoint; the bundle appears at ``job.output`` only when its own graphs pass their golden vectors.

    Raises:
        UsageError: checkpoint, tokenizer, context length or output cannot be used, or an extra is missing.
        VerificationError: a stage of the exported graphs is out of tolerance.
        BackendMissingError: no runtime on this host can replay the target.
    """
    refuse_existing(job.output)
    exporter = load_exporter(job.target)
    processing = read_processing(job.checkpoint)
    model = open_streamed(job.checkpoint) if job.target in STREAMED else open_whole(job.checkpoint)
    vlm = model.vlm
    _check_image_size(job.checkpoint, vlm, processing)
    _check_projector(job.checkpoint, vlm)
    questions = probes(processing, open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent))
    context_length = _context_length(job, vlm, questions)
    shapes = {name: tuple(weight.shape) for name, weight in vlm.state_dict().items()}
    check_room(job.target, job.output, shapes, job.precision, model_shape(vlm, context_length), len(questions))
    source = source_of(job.checkpoint)
    progress(f"checkpoint {job.checkpoint} opened and hashed")
    with work_folder(job.output, _identity(job, source, context_length), progress) as work:
        folder = work.bundle
        exported = exporter(
            ExportRequest(
                vlm=vlm,
                precision=job.precision,
                context_length=context_length,
                tokenizer_path=processing.tokenizer_path,
                eos_ids=processing.tokenizer.eos_ids,
                bos_id=processing.tokenizer.bos_id,
                output=folder,
                progress=progress,
                weights=model.weights,
                work=work,
                onnx=job.onnx,
            )
        )
        shutil.copyfile(processing.tokenizer_path, folder / TOKENIZER_FILE)
        recorded = _record(job, model, exported.dequantized, questions, folder, progress)
        release_free_memory()
        progress(f"golden vectors of {len(questions)} questions recorded")
        tolerances = stage_tolerances(job.target, job.precision, recorded.rounding_error)
        manifest = _manifest(job, vlm, source, processing, exported, context_length, tolerances)
        parity = _check(folder, job, manifest, recorded.quantization_error)
        progress(f"replayed on {parity.runtime}: every stage within tolerance")
        manifest = manifest.model_copy(update={"parity": parity, "files": file_records(folder)})
        write_manifest(folder, manifest)
    return manifest


def _identity(job: ExportJob, source: Source, context_length: int) -> dict[str, Any]:
    """What decides the graphs: an export that broke off is continued only by the same."""
    return {
        "target": job.target,
        "precision": job.precision,
        "context_length": context_length,
        "onnx": asdict(job.onnx),
        "weights_sha256": source.weights_sha256,
        "environment": environment_of(job.target),
    }


def _check_image_size(checkpoint: Path, vlm: MobileVlm, processing: Processing) -> None:
    wanted = vlm.config.vision_config.image_size
    if processing.image.size != wanted:
        raise UsageError(
            f"{checkpoint}: preprocessor_config.json makes images of {processing.image.size} pixels, the vision tower "
            f"takes {wanted}; copy preprocessor_config.json of the tower it was trained with"
        )


def _check_projector(checkpoint: Path, vlm: MobileVlm) -> None:
    projector = vlm.config.projector_type
    if projector != LDP_V2:
        raise UsageError(
            f"{checkpoint}: projector '{projector}' can be trained but not exported yet; exported is {LDP_V2}; distil "
            "into such a student first: alignkd-distill --help"
        )


def _context_length(job: ExportJob, vlm: MobileVlm, questions: Sequence[Probe]) -> int:
    longest = int(vlm.config.text_config.max_position_embeddings)
    prompts = [len(p.prompt.token_ids) + (0 if p.image is None else vlm.config.visual_tokens - 1) for p in questions]
    needed = max(prompts) + GREEDY_TOKENS
    length = job.context_length if job.context_length is not None else max(min(DEFAULT_CONTEXT, longest), needed)
    if not needed <= length <= longest:
        raise UsageError(
            f"--context-length {length} does not fit {job.checkpoint}: allowed are {needed} (the longest golden prompt "
            f"and {GREEDY_TOKENS} answer tokens) to {longest} (the model's max_position_embeddings)"
        )
    return length


@dataclass(frozen=True)
class Recorded:
    """What recording the golden vectors told: quantization error and sensitivity to rounded activations, by stage."""

    quantization_error: dict[Stage, float]
    rounding_error: dict[Stage, float]


@torch.no_grad()
def _record(
    job: ExportJob,
    model: LoadedModel,
    dequantized: Mapping[str, torch.Tensor],
    questions: Sequence[Probe],
    folder: Path,
    progress: Callable[[str], None],
) -> Recorded:
    """Write the golden vectors of the weights that the files hold; ``model`` computes with them afterwards."""
    rounds = 2 if dequantized else 1
    meter = Meter("golden vectors", golden_work(model.vlm, questions, rounds, forced_rounds=2), progress)
    in_float = outputs = run_stages_together(model, questions, meter.advance)
    _check_dequantized(job, model.weights, dequantized)
    model.use(dequantized)
    if dequantized:
        outputs = run_stages_together(model, questions, meter.advance)
    write_golden(
        folder,
        [golden_case(probe, out) for probe, out in zip(questions, outputs, strict=True)],
        {name: v for probe, out in zip(questions, outputs, strict=True) for name, v in golden_vectors(probe, out)},
        {probe.image_file: probe.image for probe in questions if probe.image_file and probe.image},
    )
    with rounded_activations(model.vlm, ACTIVATIONS[job.target][job.precision]):
        rounding_error = forced_errors_together(model, questions, outputs, meter.advance)
    return Recorded(forced_errors_together(model, questions, in_float, meter.advance), rounding_error)


def _check_dequantized(
    job: ExportJob, weights: Mapping[str, torch.Tensor], dequantized: Mapping[str, torch.Tensor]
) -> None:
    """Compare what the files hold with the checkpoint, weight by weight.

    Raises:
        VerificationError: a weight is too far from the checkpoint's to be its rounding, so it was packed wrongly.
    """
    limit = WEIGHT_ERROR_LIMITS[job.precision]
    for name, error in weight_errors(weights, dequantized):
        if not error <= limit:
            raise VerificationError(
                f"the {job.target} files do not hold the checkpoint's weights at {job.precision}: '{name}' is off by "
                f"{error:.2e}, rounding explains {limit}; {job.output} was not written: run alignkd-doctor"
            )


def _manifest(
    job: ExportJob,
    vlm: MobileVlm,
    source: Source,
    processing: Processing,
    exported: ExportedGraphs,
    context_length: int,
    tolerances: dict[Stage, float],
) -> Manifest:
    return Manifest(
        name=job.name or f"{job.checkpoint.resolve().name}-{job.target}-{job.precision}",
        target=job.target,
        precision=job.precision,
        source=source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment_of(job.target),
        model=model_shape(vlm, context_length),
        graphs=exported.graphs,
        quantization=exported.quantization,
        image=processing.image,
        prompt=processing.prompt,
        tokenizer=processing.tokenizer.model_copy(update={"path": TOKENIZER_FILE}),
        golden=Golden(vectors=VECTORS_FILE, cases=CASES_FILE, tolerances=tolerances),
        files={},
    )


def _check(folder: Path, job: ExportJob, manifest: Manifest, quantization_error: dict[Stage, float]) -> Parity:
    """Replay the golden vectors on the target's own runtime.

    Raises:
        VerificationError: the first stage out of tolerance.
    """
    runtime = open_runtime(folder, manifest)
    try:
        errors = replay(runtime, manifest, read_golden(folder, manifest))
    finally:
        runtime.close()
    tolerances = manifest.golden.tolerances
    for stage, error in errors.items():
        if not error <= tolerances[stage]:  # an error that is not a number fails too
            raise VerificationError(
                f"the {job.target} graphs at {job.precision} do not compute what the model computes: stage '{stage}' "
                f"is off by {error:.2e} on {runtime.name}, tolerance {tolerances[stage]:.2e}; {job.output} was not "
                "written: run alignkd-doctor to check the installed versions"
            )
    graph_error = {
        stage: StageParity(relative_error=error, tolerance=tolerances[stage]) for stage, error in errors.items()
    }
    return Parity(runtime=runtime.name, graph_error=graph_error, quantization_error=quantization_error)
