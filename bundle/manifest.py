"""manifest.json <-> Manifest: everything a phone needs to know of a bundle, and the sha256 of every file in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bundle.errors import UsageError, VerificationError
from bundle.staging import inside, sha256_of, write_text_whole

MANIFEST_VERSION = 2
MANIFEST_FILE = "manifest.json"
SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")

Target = Literal["onnx", "executorch", "coreml", "coreai"]
Backend = Literal["xnnpack", "coreml", "vulkan"]
Precision = Literal["int4", "int8", "fp16", "fp32"]
GraphName = Literal["vision_encoder", "token_embedding", "text_decoder"]
Stage = Literal["prompt", "pixels", "visual_tokens", "embeddings", "first_logits", "greedy_tokens"]
STAGES: tuple[Stage, ...] = ("prompt", "pixels", "visual_tokens", "embeddings", "first_logits", "greedy_tokens")
VectorSet = Literal["float", "dequantized"]
VECTOR_SETS: tuple[VectorSet, ...] = ("float", "dequantized")
Engine = Literal["gpu", "ane"]  # of Core ML's graphs: whose rules they keep
# What computes: kernels round differently from one to the other (bundle/tolerances.py)
Family = Literal["x86_64-vnni", "x86_64-avx2", "arm64-i8mm", "arm64-dotprod", "arm64", "apple", "evaluator"]


class Frozen(BaseModel):
    """Base of every manifest part: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Frozen):
    """What a file in the bundle must be."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]


class Tensor(Frozen):
    """An input, output or state of a graph; None is a dynamic dimension."""

    name: str
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: tuple[int | None, ...]


class Graph(Frozen):
    """One of the three graphs: where it lies and what goes in and out."""

    path: str = Field(description="file, or .mlpackage or .aimodel folder, relative to the bundle")
    method: str | None = Field(default=None, description="entry point, where one file holds several (ExecuTorch)")
    backend: Backend | None = Field(
        default=None,
        description="what it was lowered to, where a target has several (ExecuTorch)",
    )
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...] = ()


class GraphQuantization(Frozen):
    """How one graph's matrix weights are stored."""

    weights: str = Field(description="e.g. 'int4 symmetric', 'int8 symmetric', 'float16'")
    group_size: int | None = Field(default=None, description="values that share a scale; None = one scale per channel")
    activations: str = Field(description="e.g. 'int8 dynamic per token', 'float32'")


class ModelShape(Frozen):
    """The sizes a runner allocates by."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    visual_tokens: int


class ImageSpec(Frozen):
    """Image file -> pixel_values [1, 3, size, size] float32; Pillow's filters are the reference."""

    size: int
    strategy: Literal["pad", "crop", "stretch"]
    resample: Literal["bicubic"] = "bicubic"
    pad_rgb: tuple[int, int, int] = (122, 116, 104)
    rescale: float = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class PromptSpec(Frozen):
    """Question -> prompt text: prefix + [image marker + after_image] + before_question + question + suffix."""

    template: Literal["v1", "plain", "chat"] = Field(description="chat: a checkpoint's own template, cut to pieces")
    prefix: str
    image_marker: str = "<image>"
    after_image: str = "\n"
    before_question: str = ""
    suffix: str


class TokenizerSpec(Frozen):
    """Which tokenizer file to load, and the ids a runner needs."""

    kind: Literal["sentencepiece", "tokenizers"] = Field(description="of a tokenizer.model or a tokenizer.json")
    path: str
    bos_id: int | None = Field(description="None: prompts begin with no mark of their own")
    eos_ids: tuple[int, ...]
    pad_id: int
    image_token_id: int = -200


class StageParity(Frozen):
    """Error of a stage at export time, between the graph and its reference."""

    relative_error: float
    tolerance: float


class Parity(Frozen):
    """What the exporter measured on its own host, worst golden case, relative L2 (docs/verification.md)."""

    runtime: str
    family: Family
    graph_error: dict[Stage, StageParity] = Field(description="the runtime against the weights that the files hold")
    quantization_error: dict[Stage, float] = Field(description="dequantised against float weights, both in torch")
    total_error: dict[Stage, float] = Field(description="the runtime against the checkpoint in float32")


class Golden(Frozen):
    """Recorded vectors (see bundle/golden.py), what explains a distance from them, and how far a stage may be."""

    cases: str
    vectors: dict[VectorSet, str] = Field(
        description="of the checkpoint in float32, and of the same with the weights that the files hold; one file for "
        "both where the files hold the checkpoint's own weights"
    )
    constants: str = Field(description="digest of every constant of the graphs when the vectors were recorded")
    activation_error: dict[Stage, float] = Field(
        description="what rounding activations as the target's kernels do moves, simulated in torch"
    )
    tolerances: dict[Family, dict[Stage, float]] = Field(description="of graph_error, by what computes")
    quantization_tolerances: dict[Stage, float] = Field(description="of quantization_error")


class PrefixCache(Frozen):
    """Keys and values of the text that every prompt begins with, computed at export by the bundle's own decoder."""

    path: str = Field(description="safetensors: every past_key_values.* of the decoder, [1, kv_heads, rows, head_dim]")
    token_ids: tuple[int, ...] = Field(
        description="one per row; a prompt that begins with the first n of them may start with n rows in its cache"
    )


class CoreMl(Frozen):
    """What a runner of Core ML packages needs beside the graphs' inputs."""

    engine: Engine = Field(description="gpu: sizes are dynamic; ane: Neural Engine, sizes are static")
    functions: dict[str, int] = Field(
        default={},
        description="entry points of the embedding and the decoder, and the rows that each takes at once: a dimension "
        "of null is that number; empty: one entry point, any number",
    )
    rope_theta: float | None = Field(
        default=None, description="base of the rotary embedding, where the runner hands in cosines and sines"
    )


class Source(Frozen):
    """The checkpoint that the bundle was made of."""

    name: str
    architecture: str
    weights_sha256: str


class RuleRecord(Frozen):
    """One rule of a recipe; the first whose pattern matches a weight's whole name decides."""

    pattern: str = Field(description="regular expression over state-dict names of the checkpoint")
    bits: int
    group_size: int | None = None


class CalibrationRecord(Frozen):
    """The data that methods and recipes were chosen on."""

    sha256: str = Field(description="of the data set")
    rows: int = Field(description="conversations that were looked at")


class RecipeRecord(Frozen):
    """How wide each weight is stored, and how the 4-bit codes were chosen."""

    name: str
    method: Literal["rtn", "hqq", "gptq"]
    rules: tuple[RuleRecord, ...]
    calibration: CalibrationRecord | None = None
    budget_mb: float | None = Field(default=None, description="megabytes of 10^6 bytes that the recipe was chosen for")


class Manifest(Frozen):
    """The whole contract of one bundle: one target at one precision."""

    manifest_version: Literal[2] = 2
    name: str
    target: Target
    precision: Precision
    source: Source
    created: str = Field(description="RFC 3339 time")
    environment: dict[str, str] = Field(description="package -> version at export")
    model: ModelShape
    graphs: dict[GraphName, Graph]
    quantization: dict[GraphName, GraphQuantization]
    recipe: RecipeRecord | None = None
    image: ImageSpec
    prompt: PromptSpec
    tokenizer: TokenizerSpec
    golden: Golden
    prefix_cache: PrefixCache | None = None
    coreml: CoreMl | None = Field(default=None, description="of target coreml")
    parity: Parity | None = None
    files: dict[str, FileRecord]


def file_records(bundle: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file under ``bundle`` except the manifest itself, by relative POSIX name."""
    names = sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file())
    return {
        name: FileRecord(sha256=sha256_of(bundle / name), size_bytes=(bundle / name).stat().st_size)
        for name in names
        if name != MANIFEST_FILE
    }


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write ``manifest`` as the bundle's manifest.json."""
    write_text_whole(bundle / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")


def read_manifest(bundle: Path) -> Manifest:
    """Read and check manifest.json: version, shape, and that no name leaves the bundle.

    Raises:
        UsageError: no bundle there, another manifest version, or a manifest of the wrong shape.
    """
    path = bundle / MANIFEST_FILE
    if not path.is_file():
        raise UsageError(f"{bundle} is no bundle: it has no {MANIFEST_FILE}; make one with: alignkd-export CHECKPOINT")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON ({error}); export the bundle again") from error
    version = raw.get("manifest_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise UsageError(
            f"{path} has manifest_version {version}; this alignkd reads {MANIFEST_VERSION}; "
            "run: pip install --upgrade alignkd"
        )
    if isinstance(version, int) and version < MANIFEST_VERSION:
        raise UsageError(
            f"{path} has manifest_version {version}, written by an older alignkd; this one reads {MANIFEST_VERSION}: "
            "export the checkpoint again with alignkd-export"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise UsageError(
            f"{path}: field '{where}': {first['msg']} ({error.error_count()} problems); export the bundle again"
        ) from error
    _check_names(bundle, manifest)
    return manifest


def _check_names(bundle: Path, manifest: Manifest) -> None:
    named = [graph.path for graph in manifest.graphs.values()]
    golden = manifest.golden
    named += [manifest.tokenizer.path, golden.cases, golden.constants, *golden.vectors.values()]
    named += [] if manifest.prefix_cache is None else [manifest.prefix_cache.path]
    for name in [*manifest.files, *named]:
        inside(bundle, name, "manifest path")


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Compare every file with its record, and refuse files that the manifest does not list.

    Raises:
        VerificationError: the first file that is missing, truncated, changed or unlisted, by name.
    """
    for name, record in manifest.files.items():
        path = inside(bundle, name, "manifest path")
        if not path.is_file():
            raise VerificationError(f"{bundle}: file '{name}' is missing; copy or export the bundle again")
        size = path.stat().st_size
        if size != record.size_bytes:
            raise VerificationError(
                f"{bundle}: file '{name}' has {size} bytes, the manifest says {record.size_bytes}; "
                "it is truncated or replaced: copy or export the bundle again"
            )
        if sha256_of(path) != record.sha256:
            raise VerificationError(
                f"{bundle}: file '{name}' was changed (its sha256 differs); copy or export the bundle again"
            )
    unlisted = sorted(
        p.relative_to(bundle).as_posix()
        for p in bundle.rglob("*")
        if p.is_file() and p.relative_to(bundle).as_posix() not in {*manifest.files, MANIFEST_FILE}
    )
    if unlisted:
        raise VerificationError(f"{bundle}: file '{unlisted[0]}' is not listed in {MANIFEST_FILE}; remove it")


def json_schema() -> str:
    """The JSON Schema of the manifest, as committed in bundle/manifest.schema.json for Kotlin and Swift."""
    return json.dumps(Manifest.model_json_schema(), indent=1, sort_keys=True) + "\n"
