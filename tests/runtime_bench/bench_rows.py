"""What several tests here share: a manifest, a runtime that only counts, and rows as alignkd-bench writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bundle.manifest import Golden, ImageSpec, Manifest, ModelShape, Source, TokenizerSpec
from bundle.prompt import TEMPLATES
from bundle.runtimes.contract import Floats, Ids
from runtime_bench.result import Accuracy, BenchmarkScore, BundleRef, Device, Memory, Quantity, Row, Settings
from runtime_bench.stats import measurement

TOKENIZER_MODEL = Path(__file__).parents[1] / "golden" / "reference" / "student" / "tokenizer.model"
TOKENIZER = TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=1, eos_ids=(2,), pad_id=0)
IMAGE = ImageSpec(size=28, strategy="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
WIDTH, HEADS, LAYERS, CONTEXT = 32, 2, 1, 128
VISUAL_TOKENS = 4  # 28 px in patches of 7, pooled 2x2
DEVICE = Device(
    name="this host",
    cpu="a processor",
    architecture="x86_64",
    cores=2,
    memory_bytes=8_000_000_000,
    os="an operating system",
    python="3.11.7",
)


def manifest_of(vocab_size: int, **more: object) -> Manifest:
    """The manifest of the tiny model; ``more`` replaces fields."""
    fields: dict[str, object] = {
        "name": "tiny-onnx-fp32",
        "target": "onnx",
        "precision": "fp32",
        "source": Source(name="random", architecture="MobileVlm", weights_sha256="0" * 64),
        "created": "2026-01-01T00:00:00Z",
        "environment": {},
        "model": ModelShape(
            hidden_size=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=WIDTH // HEADS,
            vocab_size=vocab_size,
            context_length=CONTEXT,
            visual_tokens=VISUAL_TOKENS,
        ),
        "graphs": {},
        "quantization": {},
        "image": IMAGE,
        "prompt": TEMPLATES["v1"],
        "tokenizer": TOKENIZER,
        "golden": Golden(
            cases="golden/none",
            vectors={},
            constants="golden/none",
            activation_error={},
            tolerances={},
            quantization_tolerances={},
        ),
        "files": {},
    }
    return Manifest.model_validate({**fields, **more})


class CountingRuntime:
    """A runtime that computes nothing and writes down what it was asked."""

    name = "counting 1"
    covers = "nothing"

    def __init__(self, vocab_size: int, log: list[str]) -> None:
        self._vocab_size, self._rows, self.log = vocab_size, 0, log

    @property
    def position(self) -> int:
        return self._rows

    def encode_image(self, pixel_values: Floats) -> Floats:
        self.log.append(f"encode {list(pixel_values.shape)}")
        return np.ones((1, VISUAL_TOKENS, WIDTH), dtype=np.float32)

    def embed(self, input_ids: Ids) -> Floats:
        self.log.append(f"embed {input_ids.shape[1]}")
        return np.zeros((1, input_ids.shape[1], WIDTH), dtype=np.float32)

    def decode(self, inputs_embeds: Floats) -> Floats:
        self._rows += inputs_embeds.shape[1]
        self.log.append(f"decode {inputs_embeds.shape[1]}")
        return np.eye(1, self._vocab_size, 7, dtype=np.float32)[0]

    def reset(self, prefix_rows: int = 0) -> None:
        self._rows = 0
        self.log.append(f"reset to {prefix_rows}" if prefix_rows else "reset")

    def close(self) -> None:
        self.log.append("close")


SPEEDS: dict[Quantity, list[float]] = {
    "cold_load_ms": [20.0],
    "vision_encode_ms": [30.0, 31.0, 29.0],
    "ttft_ms": [50.0, 52.0, 51.0],
    "prefill_tokens_per_s": [900.0],
    "decode_tokens_per_s": [100.0],
    "decode_ms_per_token": [10.0],
}


def make_row(
    name: str = "student",
    target: str = "onnx",
    precision: str = "int4",
    speeds: dict[Quantity, list[float]] | None = None,
    scores: dict[str, float] | None = None,
    emulated: bool = False,
    digest: str = "",
    threads: int | None = 1,
) -> Row:
    """A run row when it has speeds (by quantity), an accuracy row when it has scores (by benchmark)."""
    letters = digest or f"{name}{target}{precision}".encode().hex()
    ran = speeds is not None
    return Row(
        kind="run" if ran else "accuracy",
        time="2026-01-02T03:04:05Z",
        bundle=BundleRef.model_validate(
            {
                "name": name,
                "path": f"out/{name}",
                "manifest_sha256": letters[-64:].zfill(64),
                "target": target,
                "precision": precision,
                "size_bytes": 3_000_000,
                "weights_bytes": 2_000_000,
                "created": "2026-01-01T00:00:00Z",
            }
        ),
        runtime="engine 1.0",
        covers="CPU",
        emulated=emulated,
        device=DEVICE,
        settings=Settings(
            threads=threads,
            warmup=1,
            repeats=3,
            load_repeats=1,
            prompt_tokens=60,
            visual_tokens=4,
            new_tokens=8,
            image="made",
            cold=True,
        )  # fmt: skip
        if ran
        else None,
        measurements={quantity: measurement(values) for quantity, values in (speeds or {}).items()},
        memory=Memory(peak_bytes=150_000_000, baseline_bytes=60_000_000) if ran else None,
        accuracy=None
        if scores is None
        else Accuracy(
            data="data",
            benchmarks={
                name: BenchmarkScore(score=score, n_scored=20, n_expected=20, protocol="llava")
                for name, score in scores.items()
            },
        ),
        excludes="Times exclude much." if ran else "",
    )
