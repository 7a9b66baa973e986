"""Checkpoint directory -> bundle directory: export, record golden vectors, replay them here, write the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bundle.constants import record_constants
from bundle.errors import UsageError, VerificationError
from bundle.golden import GREEDY_TOKENS, read_golden
from bundle.manifest import (
    Manifest,
    Parity,
    Precision,
    Source,
    StageParity,
    Target,
    file_records,
    write_manifest,
)
from bundle.runtimes.registry import first_entry, runs_elsewhere
from bundle.staging import refuse_existing, write_text_whole
from bundle.tokenizer import open_tokenizer
from bundle.verify import verdict_of
from distill.models.checkpoint import open_checkpoint
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from export.contract import CoreMlOptions, ExecutorchOptions, ExportedGraphs, ExportRequest, OnnxOptions, storages
from export.coreai.stock import write_stock_files
from export.golden.prefix import refuse_prefix, write_prefix
from export.golden.record import Probe, probes
from export.golden.recording import Recorded, record
from export.job.room import STREAMED, check_room, release_free_memory
from export.job.work_folder import work_folder
from export.model.shape import model_shape
from export.model.streamed import LoadedModel, open_streamed, open_whole
from export.provenance import environment_of, source_of
from export.quantize.blame import BLAME_FILE
from export.quantize.decide import Case, Decision, decide
from export.quantize.request import Quantizing
from export.supported import check_supported
from export.targets import load_exporter
from export.weights.lazy import Layered
from export.weights.recipe import RECIPES, Storage

# KV cache rows when the user names no number: an image, a long question and a long answer of the six benchmarks fit,
# and a 1.7B model's float32 cache stays at 0.4 GB.
DEFAULT_CONTEXT = 1024


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
    executorch: ExecutorchOptions = ExecutorchOptions()
    coreml: CoreMlOptions = CoreMlOptions()
    prefix_cache: bool = False
    quantizing: Quantizing | None = None  # None: the precision's recipe, rounded to nearest

    @property
    def asked(self) -> Quantizing:
        """What is asked of quantization."""
        return self.quantizing or Quantizing(RECIPES[self.precision])

    def storages(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Storage]:
        """Weights that are stored otherwise than the recipe says."""
        return storages(shapes, self.precision, self.onnx, self.executorch, self.coreml)


def export_bundle(job: ExportJob, progress: Callable[[str], None]) -> Manifest:
    """Export a checkpoint; the bundle appears at ``job.output`` only when its own graphs pass their golden vectors.

    Raises:
        UsageError: checkpoint, tokenizer, context length or output cannot be used, or an extra is missing.
        VerificationError: a stage of the exported graphs is out of tolerance.
        BackendMissingError: no runtime on this host can replay the target.
    """
    refuse_existing(job.output)
    if job.prefix_cache:
        refuse_prefix(job.target)
    exporter = load_exporter(job.target)
    processing = read_processing(job.checkpoint)
    skeleton, _ = open_checkpoint(job.checkpoint)
    questions = probes(processing, open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent))
    context_length = _context_length(job, skeleton, questions)
    check_supported(job.checkpoint, skeleton, processing, context_length, job.target)
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    shape = model_shape(skeleton, context_length)
    asked = job.asked
    check_room(job.target, job.output, shapes, asked.bound, shape, len(questions), codes=asked.method != "rtn")
    source = source_of(job.checkpoint)
    model = open_streamed(job.checkpoint) if job.target in STREAMED else open_whole(job.checkpoint)
    progress(f"checkpoint {job.checkpoint} opened and hashed")
    with work_folder(job.output, _identity(job, source, context_length), progress) as work:
        folder = work.bundle
        case = Case(job.checkpoint, job.target, processing, context_length, shapes, job.storages(shapes), work.notes)
        decision = decide(case, job.asked, progress)
        if decision.blame is not None:
            write_text_whole(folder / BLAME_FILE, decision.blame.model_dump_json(indent=1) + "\n")
        chosen = decision.chosen
        request = ExportRequest(
            vlm=model.vlm,
            precision=job.precision,
            context_length=context_length,
            tokenizer_path=processing.tokenizer_path,
            eos_ids=processing.tokenizer.eos_ids,
            bos_id=processing.tokenizer.bos_id,
            output=folder,
            progress=progress,
            weights=model.weights if chosen is None else Layered(chosen, model.weights),
            work=work,
            onnx=job.onnx,
            executorch=job.executorch,
            coreml=job.coreml,
            own_recipe=decision.recipe,
            chosen=chosen,
        )
        exported = exporter(request)
        shutil.copyfile(processing.tokenizer_path, folder / processing.tokenizer.path)
        recorded = _record(request, job, model, exported.dequantized, questions)
        release_free_memory()
        progress(f"golden vectors of {len(questions)} questions recorded")
        manifest = _manifest(job, model.vlm, source, processing, exported, context_length, recorded, decision)
        if job.target == "coreai":
            patch_size = manifest.image.size // skeleton.config.patch_grid
            write_stock_files(folder, manifest, processing.tokenizer_path, patch_size)
        record_constants(folder, manifest)
        if job.prefix_cache:
            manifest = manifest.model_copy(update={"prefix_cache": write_prefix(folder, manifest)})
            progress("keys and values of the constant prompt written")
        elsewhere = runs_elsewhere(manifest)
        parity = None if elsewhere else _check(folder, job, manifest)
        progress(
            f"written but not verified: {elsewhere}"
            if parity is None
            else f"replayed on {parity.runtime}: every stage within tolerance"
        )
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
        "executorch": asdict(job.executorch),
        "coreml": asdict(job.coreml),
        "prefix_cache": job.prefix_cache,
        "quantizing": job.asked.identity(),
        "weights_sha256": source.weights_sha256,
        "environment": environment_of(job.target),
    }


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


def _record(
    request: ExportRequest,
    job: ExportJob,
    model: LoadedModel,
    dequantized: Mapping[str, torch.Tensor],
    questions: Sequence[Probe],
) -> Recorded:
    try:
        return record(model, dequantized, questions, request.plan(job.target), request.output, request.progress)
    except VerificationError as error:
        raise VerificationError(f"{error}; {job.output} was not written: run alignkd-doctor") from error


def _manifest(
    job: ExportJob,
    vlm: MobileVlm,
    source: Source,
    processing: Processing,
    exported: ExportedGraphs,
    context_length: int,
    recorded: Recorded,
    decision: Decision,
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
        recipe=decision.record,
        image=processing.image,
        prompt=processing.prompt,
        tokenizer=processing.tokenizer,
        golden=recorded.golden(job.target, job.precision),
        coreml=exported.coreml,
        files={},
    )


def _check(folder: Path, job: ExportJob, manifest: Manifest) -> Parity:
    """Replay the golden vectors on the target's own runtime.

    Raises:
        VerificationError: the first stage out of tolerance, the kind of fault and what to run next.
    """
    verdict = verdict_of(first_entry(manifest.target), folder, manifest, read_golden(folder, manifest))
    if verdict.problem is not None:
        raise VerificationError(
            f"the {job.target} graphs at {job.precision} do not compute what the model computes on {verdict.runtime}: "
            f"{verdict.problem}; {job.output} was not written"
        )
    return Parity(
        runtime=verdict.runtime,
        family=verdict.family,
        graph_error={
            row.stage: StageParity(relative_error=row.error, tolerance=row.tolerance) for row in verdict.stages
        },
        quantization_error={row.stage: row.quantization_error for row in verdict.stages},
        total_error={row.stage: row.total_error for row in verdict.stages},
    )
