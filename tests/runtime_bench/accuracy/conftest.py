"""The golden benchmark folders, and a bundle that answers whatever a test puts into its mouth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.manifest import (
    Golden,
    Graph,
    GraphQuantization,
    ImageSpec,
    Manifest,
    ModelShape,
    Source,
    TokenizerSpec,
    file_records,
    write_manifest,
)
from bundle.prompt import TEMPLATES
from bundle.runtimes import registry
from bundle.runtimes.contract import Floats, Ids
from bundle.tokenizer import open_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
WIDTH, VOCABULARY, VISUAL_TOKENS, SIZE, CONTEXT, EOS = 4, 512, 4, 32, 1024, 2


@pytest.fixture
def scoring() -> Path:
    """The golden data root: six benchmark folders with answer files and the official numbers."""
    return GOLDEN / "scoring"


@pytest.fixture
def data(tmp_path: Path, scoring: Path) -> Path:
    """A copy of the golden data root that a test may change."""
    return Path(shutil.copytree(scoring, tmp_path / "data"))


@pytest.fixture
def rewrite(tmp_path: Path) -> Callable[[Path, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]], Path]:
    """Copy a jsonl file with its records changed by a function."""

    def changed(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        target = tmp_path / f"changed_{path.name}"
        target.write_text("".join(json.dumps(record) + "\n" for record in change(records)), encoding="utf-8")
        return target

    return changed


@dataclass
class ScriptedRuntime:
    """Says ``reply`` to every prompt; keeps the pixels it was shown and counts the questions."""

    reply: list[int]
    name: str = "scripted 1.0"
    covers: str = "the test's script"
    pixels: list[Floats] = field(default_factory=list)
    questions: int = 0
    fail_after: int | None = None
    rows: int = 0
    said: int = 0

    @property
    def position(self) -> int:
        return self.rows

    def encode_image(self, pixel_values: Floats) -> Floats:
        self.pixels.append(pixel_values)
        return np.zeros((1, VISUAL_TOKENS, WIDTH), dtype=np.float32)

    def embed(self, input_ids: Ids) -> Floats:
        return np.zeros((1, input_ids.shape[1], WIDTH), dtype=np.float32)

    def decode(self, inputs_embeds: Floats) -> Floats:
        if self.rows == 0:
            if self.questions == self.fail_after:
                raise KeyboardInterrupt
            self.questions += 1
        self.rows += inputs_embeds.shape[1]
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        logits[(*self.reply, EOS)[self.said]] = 1.0
        self.said += 1
        return logits

    def reset(self, prefix_rows: int = 0) -> None:
        self.rows = self.said = 0

    def close(self) -> None:
        self.rows = 0


@dataclass
class ScriptedModule:
    """Stands where a file of bundle/runtimes would."""

    runtime: ScriptedRuntime

    def available(self) -> str | None:
        return None

    def open_runtime(self, bundle: Path, manifest: Manifest, threads: int | None) -> ScriptedRuntime:
        return self.runtime


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A bundle directory whose graphs are empty files."""
    folder = tmp_path / "scripted-bundle"
    folder.mkdir()
    shutil.copy(GOLDEN / "reference/student/tokenizer.model", folder / "tokenizer.model")
    names = ("vision_encoder", "token_embedding", "text_decoder")
    for name in (*names, "vectors", "cases"):
        (folder / f"{name}.bin").write_bytes(name.encode())
    manifest = Manifest(
        name="scripted",
        target="onnx",
        precision="fp32",
        source=Source(name="test", architecture="none", weights_sha256="0" * 64),
        created="2026-01-01T00:00:00Z",
        environment={},
        model=ModelShape(
            hidden_size=WIDTH,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=WIDTH,
            vocab_size=VOCABULARY,
            context_length=CONTEXT,
            visual_tokens=VISUAL_TOKENS,
        ),
        graphs={name: Graph(path=f"{name}.bin", inputs=(), outputs=()) for name in names},
        quantization={name: GraphQuantization(weights="float32", activations="float32") for name in names},
        image=ImageSpec(size=SIZE, strategy="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        prompt=TEMPLATES["v1"],
        tokenizer=TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=1, eos_ids=(EOS,), pad_id=0),
        golden=Golden(
            cases="cases.bin",
            vectors={},
            constants="constants.bin",
            activation_error={},
            tolerances={},
            quantization_tolerances={},
        ),
        files={},
    )
    write_manifest(folder, manifest.model_copy(update={"files": file_records(folder)}))
    return folder


@pytest.fixture
def runtime(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedRuntime:
    """The only runtime of target onnx; it answers "Yes"."""
    spec = TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=1, eos_ids=(EOS,), pad_id=0)
    scripted = ScriptedRuntime(open_tokenizer(spec, bundle_folder).encode("Yes"))
    module = ScriptedModule(scripted)
    monkeypatch.setitem(registry.RUNTIMES, "onnx", (registry.RuntimeEntry("scripted", lambda: module),))
    return scripted
