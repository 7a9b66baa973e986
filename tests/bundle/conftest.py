"""A bundle of a few kilobytes whose runtime is a small numpy model, so that session and verifier are tested alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from bundle import constants
from bundle.constants import CONSTANTS_FILE, record_constants
from bundle.golden import CASES_FILE, GREEDY_TOKENS, VECTOR_FILES, GoldenCase, write_golden
from bundle.image import preprocess
from bundle.manifest import (
    STAGES,
    Family,
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
from bundle.prompt import TEMPLATES, build_prompt, splice, text_ids
from bundle.runtimes import registry
from bundle.runtimes.contract import Floats, Ids
from bundle.tokenizer import open_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH, VOCABULARY, VISUAL_TOKENS, SIZE, CONTEXT = 8, 512, 4, 16, 160


@dataclass
class NumpyRuntime:
    """Embedding table, mean-pooled pixels and a decaying state: small, but every stage depends on its input."""

    name: str = "numpy"
    covers: str = "the test's own arithmetic"
    faults: dict[str, Callable[[Floats], Floats]] = field(default_factory=dict)
    closed: bool = False

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        self.table = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        self.vision = random.normal(size=(3 * SIZE * SIZE // VISUAL_TOKENS, WIDTH)).astype(np.float32)
        self.head = random.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
        self.state, self.rows = np.zeros(WIDTH, dtype=np.float32), 0

    @property
    def position(self) -> int:
        return self.rows

    def encode_image(self, pixel_values: Floats) -> Floats:
        return self._through("encode_image", pixel_values.reshape(1, VISUAL_TOKENS, -1) @ self.vision)

    def embed(self, input_ids: Ids) -> Floats:
        return self._through("embed", self.table[input_ids])

    def decode(self, inputs_embeds: Floats) -> Floats:
        assert self.rows + inputs_embeds.shape[1] <= CONTEXT, "more rows than the KV cache holds"
        step = "prefill" if self.rows == 0 else "decode"
        for row in inputs_embeds[0]:
            self.state = (0.9 * self.state + np.roll(row, self.rows)).astype(np.float32)
            self.rows += 1
        return self._through(step, np.tanh(self.state) @ self.head)

    def reset(self, prefix_rows: int = 0) -> None:
        self.state, self.rows = np.zeros(WIDTH, dtype=np.float32), 0

    def close(self) -> None:
        self.closed = True

    def _through(self, stage: str, output: Floats) -> Floats:
        return self.faults.get(stage, lambda same: same)(output)


@dataclass
class NumpyModule:
    """Stands where a file of bundle/runtimes would."""

    runtime: NumpyRuntime
    reason: str | None = None

    def available(self) -> str | None:
        return self.reason

    def open_runtime(self, bundle: Path, manifest: Manifest, threads: int | None) -> NumpyRuntime:
        return self.runtime


@pytest.fixture
def numpy_module(monkeypatch: pytest.MonkeyPatch) -> NumpyModule:
    """The only runtime of target onnx, under the name "numpy"."""
    module = NumpyModule(NumpyRuntime())
    monkeypatch.setitem(constants.READERS, "onnx", lambda path: iter([("weights", path.read_bytes())]))
    monkeypatch.setitem(registry.RUNTIMES, "onnx", (registry.RuntimeEntry("numpy", lambda: module),))
    return module


def numpy_manifest() -> Manifest:
    """The manifest of the numpy model, before its files are listed."""
    return Manifest(
        name="numpy-tiny",
        target="onnx",
        precision="fp32",
        source=Source(name="test", architecture="numpy", weights_sha256="0" * 64),
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
        graphs={
            name: Graph(path=f"{name}.bin", inputs=(), outputs=())
            for name in ("vision_encoder", "token_embedding", "text_decoder")
        },
        quantization={
            name: GraphQuantization(weights="float32", activations="float32")
            for name in ("vision_encoder", "token_embedding", "text_decoder")
        },
        image=ImageSpec(size=SIZE, strategy="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        prompt=TEMPLATES["v1"],
        tokenizer=TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=1, eos_ids=(2,), pad_id=0),
        golden=Golden(
            cases=CASES_FILE,
            vectors=dict.fromkeys(VECTOR_FILES, VECTOR_FILES["float"]),
            constants=CONSTANTS_FILE,
            activation_error={},
            tolerances=dict.fromkeys(get_args(Family), {s: 0 if s == "prompt" else 1e-5 for s in STAGES}),
            quantization_tolerances=dict.fromkeys(STAGES, 1e-5),
        ),
        files={},
    )


def record_case(
    manifest: Manifest, folder: Path, name: str, question: str, image: Image.Image | None
) -> tuple[GoldenCase, dict[str, Floats]]:
    """Run the numpy model by hand, the way an exporter records its reference."""
    runtime, image_id = NumpyRuntime(), manifest.tokenizer.image_token_id
    tokenizer = open_tokenizer(manifest.tokenizer, folder)
    prompt = build_prompt(manifest.prompt, tokenizer, manifest.tokenizer, question, image is not None)
    vectors: dict[str, Floats] = {}
    if image is not None:
        vectors["pixels"] = preprocess(image, manifest.image)
        vectors["visual_tokens"] = runtime.encode_image(vectors["pixels"])
    vectors["embeddings"] = runtime.embed(np.array([text_ids(prompt.token_ids, image_id)]))
    logits = [runtime.decode(splice(prompt.token_ids, image_id, vectors["embeddings"], vectors.get("visual_tokens")))]
    ids = [int(logits[0].argmax())]
    while len(ids) < GREEDY_TOKENS:
        logits.append(runtime.decode(runtime.embed(np.array([[ids[-1]]]))))
        ids.append(int(logits[-1].argmax()))
    vectors["first_logits"], vectors["greedy_logits"] = logits[0], np.stack(logits)
    case = GoldenCase(
        name=name,
        image=None if image is None else f"golden/{name}.png",
        question=question,
        prompt_text=prompt.text,
        token_ids=prompt.token_ids,
        greedy_ids=tuple(ids),
    )
    return case, {f"{name}.{vector}": value for vector, value in vectors.items()}


@pytest.fixture
def picture() -> Image.Image:
    """A small picture that is not square and not smooth, so that every filter and padding shows."""
    y, x = np.mgrid[0:21, 0:34]
    planes = [(x * (13 + 5 * c) + y * (31 - 4 * c) + (x // 5 % 2) * 90) % 256 for c in range(3)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@pytest.fixture
def numpy_bundle(tmp_path: Path, numpy_module: NumpyModule, picture: Image.Image) -> Path:
    """A whole bundle directory of the numpy model, two golden cases recorded."""
    folder = tmp_path / "numpy-bundle"
    folder.mkdir()
    shutil.copy(GOLDEN / "reference/student/tokenizer.model", folder / "tokenizer.model")
    manifest = numpy_manifest()
    for graph in manifest.graphs.values():
        (folder / graph.path).write_bytes(graph.path.encode() * 9)
    with_image, vectors = record_case(manifest, folder, "stripes", "What colour is it?", picture)
    without, more = record_case(manifest, folder, "text", "Say yes.", None)
    write_golden(folder, [with_image, without], {"float": vectors | more}, {"golden/stripes.png": picture})
    record_constants(folder, manifest)
    write_manifest(folder, manifest.model_copy(update={"files": file_records(folder)}))
    return folder


@pytest.fixture
def rehash() -> Callable[..., None]:
    """Rewrite a bundle's manifest so that its files' hashes are consistent again, with fields replaced."""

    def again(folder: Path, **changes: object) -> None:
        from bundle.manifest import read_manifest

        manifest = read_manifest(folder)
        write_manifest(folder, manifest.model_copy(update={"files": file_records(folder), **changes}))

    return again
