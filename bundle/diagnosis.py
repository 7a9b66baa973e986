"""The first stage out of tolerance -> what kind of fault it is, by how much, where to look and what to run next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bundle.constants import TABLES, changed_constants
from bundle.errors import UsageError
from bundle.manifest import GraphName, Manifest, Stage

Kind = Literal["preprocessing", "graph", "quantization"]
GRAPH_OF: dict[Stage, GraphName] = {
    "visual_tokens": "vision_encoder",
    "embeddings": "token_embedding",
    "first_logits": "text_decoder",
    "greedy_tokens": "text_decoder",
}
# Where a graph of healthy weights goes wrong, by what was seen first: the prefill feeds many rows at position 0, the
# steps behind it one row at a time through the KV cache.
GRAPH_SUSPECTS: dict[Stage, str] = {
    "visual_tokens": "the tower's activation, layer count, patch order or the projector's layout",
    "embeddings": "ids that are shifted, or a gather along the wrong axis",
    "first_logits": "rotary base or tables, causal mask, positions, head layout, norm epsilon",
    "greedy_tokens": "the KV cache (keys and values swapped, rows written elsewhere), positions after the prompt, "
    "or the mask of a single row",
}
PREPROCESSING: dict[Stage, str] = {
    "prompt": "the template, its blanks or the tokenizer differ from those of the recording",
    "pixels": "the image rule (filter, padding, mean, std) differs from that of the recording",
}
SHOWN_NAMES = 3


@dataclass(frozen=True)
class StageResult:
    """Worst golden case of one stage, relative L2 errors (of the prompt: 0 or 1).

    Attributes:
        error: graph error, the runtime against the weights that the files hold.
        activation_error: of which rounding activations explains so much, simulated in torch.
        quantization_error: the weights that the files hold against the checkpoint's, both in torch, from the start.
        total_error: the runtime against the checkpoint in float32.
        where: golden case, and answer token, of ``error``.
    """

    stage: Stage
    error: float
    tolerance: float
    activation_error: float
    quantization_error: float
    quantization_tolerance: float
    total_error: float
    where: str

    @property
    def ok(self) -> bool:
        """Both within tolerance; an error that is not a number is not."""
        return self.error <= self.tolerance and self.quantization_ok

    @property
    def quantization_ok(self) -> bool:
        """The weights are no further from the checkpoint's than rounding explains."""
        return self.quantization_error <= self.quantization_tolerance


@dataclass(frozen=True)
class Diagnosis:
    """What an engineer needs to act: each field is one phrase for the report."""

    stage: Stage
    kind: Kind
    measured: str
    cause: str
    next_step: str

    def __str__(self) -> str:
        return f"stage '{self.stage}', kind {self.kind}: {self.measured}; {self.cause}; next: {self.next_step}"


def diagnose(stages: tuple[StageResult, ...], bundle: Path, manifest: Manifest) -> Diagnosis | None:
    """The first stage out of tolerance, or None.

    Weights that were further from the checkpoint's than rounding explains, or that changed since the recording, are of
    kind quantization; what the runtime does with the recorded weights is of kind graph.
    """
    bad = next((result for result in stages if not result.ok), None)
    if bad is None:
        return None
    if bad.stage in PREPROCESSING:
        return Diagnosis(
            bad.stage,
            "preprocessing",
            f"{_times(bad.error, bad.tolerance)} ({bad.where})",
            PREPROCESSING[bad.stage],
            "compare 'prompt', 'tokenizer' and 'image' of manifest.json with the checkpoint's, then export again",
        )
    if not bad.quantization_ok:
        return Diagnosis(
            bad.stage,
            "quantization",
            f"weights move it by {_times(bad.quantization_error, bad.quantization_tolerance)}",
            f"the stored weights are further from the checkpoint's than rounding to {manifest.precision} explains",
            f"alignkd-export CHECKPOINT --target {manifest.target} --int8 --output DIR, then alignkd-verify "
            f"DIR --compare {bundle}",
        )
    return _graph_or_weights(bad, bundle, manifest)


def _graph_or_weights(bad: StageResult, bundle: Path, manifest: Manifest) -> Diagnosis:
    graph, measured = GRAPH_OF[bad.stage], f"{_times(bad.error, bad.tolerance)} ({bad.where})"
    try:
        changed, unread = changed_constants(bundle, manifest, graph), ""
    except UsageError as error:
        changed, unread = [], f" (not checked whether its weights changed: {error})"
    weights = [name for name in changed if not name.startswith(TABLES)]
    if changed:
        names = ", ".join(changed[:SHOWN_NAMES]) + (", ..." if len(changed) > SHOWN_NAMES else "")
        return Diagnosis(
            bad.stage,
            "quantization" if weights else "graph",  # rotary tables are the graph's, no weights
            measured,
            f"{len(changed)} constants of {manifest.graphs[graph].path} are not those of the recording: {names}",
            "export the bundle again, and change no weights or scales afterwards",
        )
    return Diagnosis(
        bad.stage,
        "graph",
        measured,
        f"{graph} computes something else than torch with the same weights{unread}; "
        f"look at {GRAPH_SUSPECTS[bad.stage]}",
        f"alignkd-doctor (tested versions?), then alignkd-export CHECKPOINT --target {manifest.target} --fp32 --output "
        "DIR: if that passes, the quantized kernels are at fault, else the exporter",
    )


def _times(error: float, tolerance: float) -> str:
    factor = f", {error / tolerance:.1f} times the tolerance {tolerance:.2e}" if tolerance else ", must be 0"
    return f"{error:.2e}{factor}"
