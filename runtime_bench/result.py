"""Measured or scored bundle <-> Row: one self-describing line of a results file, as JSON and back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from bundle.errors import UsageError
from bundle.manifest import MANIFEST_FILE, Manifest, Precision, Target
from bundle.staging import sha256_of, write_text_whole

SCHEMA_VERSION: Final = 1
BENCHMARKS: tuple[str, ...] = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")

Quantity = Literal[
    "first_load_ms",
    "cold_load_ms",
    "warm_load_ms",
    "preprocess_ms",
    "prompt_ms",
    "vision_encode_ms",
    "embed_ms",
    "prefill_ms",
    "first_token_ms",
    "ttft_ms",
    "ttft_whole_prefill_ms",
    "decode_ms_per_token",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
]


class Part(BaseModel):
    """Base of every part of a row: immutable, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Summary(Part):
    """Median of the samples and its bootstrap interval; no interval where the samples cannot give one."""

    median: float
    low: float | None
    high: float | None
    confidence: float = 0.95
    n: Annotated[int, Field(ge=1)]


class Measurement(Part):
    """One quantity: every raw sample in the order taken, and their summary. The unit is in the quantity's name."""

    samples: tuple[float, ...]
    summary: Summary


class Memory(Part):
    """Peak and resident memory of the process that ran the bundle and nothing else."""

    peak_bytes: int = Field(description="high-water mark of resident memory (VmHWM) with one bundle loaded and run")
    baseline_bytes: int = Field(description="the same mark before the engine was imported: interpreter and numpy")
    anonymous_bytes: int | None = Field(default=None, description="resident at the end, private (RssAnon)")
    file_bytes: int | None = Field(default=None, description="resident at the end, mapped files: reclaimable (RssFile)")


class Device(Part):
    """The machine that ran the bundle."""

    name: str
    cpu: str
    architecture: str
    cores: int = Field(description="logical cores this process may use")
    memory_bytes: int
    os: str
    python: str


class Settings(Part):
    """What was asked for. None = the engine's or the template's own choice."""

    threads: int | None
    warmup: int
    repeats: int
    load_repeats: int
    prompt_tokens: int = Field(description="rows of the prefill, visual tokens included")
    known_tokens: int = Field(default=0, description="of these, rows that the bundle's prefix cache holds")
    visual_tokens: int
    new_tokens: int = Field(description="tokens made per repeat, the first one included")
    image: str = Field(description="the picture that was preprocessed and encoded")
    cold: bool = Field(description="whether the file pages were really dropped before a cold load")


class BenchmarkScore(Part):
    """One benchmark on its published scale: percent; MME = perception, 0..2000."""

    score: float
    n_scored: int
    n_expected: int
    protocol: str
    metrics: dict[str, JsonValue] = {}
    warnings: tuple[str, ...] = ()


class Accuracy(Part):
    """Scores of one bundle on one data folder."""

    data: str
    benchmarks: dict[str, BenchmarkScore]
    seconds: float | None = None


class BundleRef(Part):
    """Which bundle: its label and the hash that joins its rows."""

    name: str
    path: str
    manifest_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    target: Target
    precision: Precision
    size_bytes: int = Field(description="every file of the bundle")
    weights_bytes: int = Field(description="the graph files alone")
    created: str


class Row(Part):
    """One bundle on one runtime of one device: speed and memory, or accuracy, or both."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["run", "accuracy"]
    time: str = Field(description="RFC 3339 time of the measurement")
    commit: str | None = Field(default=None, description="of the alignkd source tree, where it is a git checkout")
    bundle: BundleRef
    runtime: str = Field(description="engine and version")
    covers: str = Field(description="what the engine's results stand for, in its own words")
    emulated: bool = Field(description="true: the engine walks the graph instead of running it; speeds mean nothing")
    device: Device
    settings: Settings | None = None
    measurements: dict[Quantity, Measurement] = {}
    memory: Memory | None = None
    accuracy: Accuracy | None = None
    excludes: str = ""

    def median(self, quantity: Quantity) -> float | None:
        """The median of a quantity, or None where the row did not measure it."""
        found = self.measurements.get(quantity)
        return None if found is None else found.summary.median


class ResultsFile(Part):
    """What a results.json holds."""

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: tuple[Row, ...]


def now() -> str:
    """The current time as RFC 3339, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def bundle_ref(bundle: Path, manifest: Manifest) -> BundleRef:
    """Describe a bundle from its manifest; sizes are the manifest's, which the hash pins."""
    graph_paths = {graph.path for graph in manifest.graphs.values()}
    return BundleRef(
        name=manifest.name,
        path=str(bundle),
        manifest_sha256=sha256_of(bundle / MANIFEST_FILE),
        target=manifest.target,
        precision=manifest.precision,
        size_bytes=sum(record.size_bytes for record in manifest.files.values())
        + (bundle / MANIFEST_FILE).stat().st_size,
        weights_bytes=sum(
            record.size_bytes
            for name, record in manifest.files.items()
            if any(name == path or name.startswith((path + "/", path + ".", path + "_")) for path in graph_paths)
        ),
        created=manifest.created,
    )


def write_results(path: Path, rows: list[Row]) -> None:
    """Write rows as one results.json, whole or not at all."""
    write_text_whole(path, ResultsFile(rows=tuple(rows)).model_dump_json(indent=1) + "\n")


def read_results(path: Path) -> list[Row]:
    """Read a results.json.

    Raises:
        UsageError: the file is missing, no JSON, of another shape, or of a newer schema.
    """
    make_one = "make one with: alignkd-bench run BUNDLE --output results.json"
    if not path.is_file():
        raise UsageError(f"results file {path} does not exist; {make_one}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON ({error}); {make_one}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema_version {version}; this alignkd reads up to {SCHEMA_VERSION}; "
            "run: pip install --upgrade alignkd"
        )
    try:
        return list(ResultsFile.model_validate(raw).rows)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise UsageError(
            f"{path} is no results file: field '{where}': {first['msg']} ({error.error_count()} problems); {make_one}"
        ) from error
