"""Golden cases and vectors <-> the golden/ folder of a bundle: what each stage must compute, recorded at export.

``golden/cases.json`` lists the cases. ``golden/float.safetensors`` holds what the checkpoint in float32 computes, and
``golden/dequantized.safetensors`` what it computes with the weights that the graphs hold: ``<case>.<vector>`` for each
vector, the two of an image only where the case has one. Images lie beside them as PNG.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bundle.errors import UsageError
from bundle.manifest import VECTOR_SETS, Frozen, Manifest, VectorSet
from bundle.prompt import text_ids
from bundle.runtimes.contract import Floats
from bundle.staging import inside, write_text_whole

CASES_FILE = "golden/cases.json"
VECTOR_FILES: dict[VectorSet, str] = {
    "float": "golden/float.safetensors",
    "dequantized": "golden/dequantized.safetensors",
}
GREEDY_TOKENS = 32

Vector = Literal["pixels", "visual_tokens", "embeddings", "first_logits", "greedy_logits"]
IMAGE_VECTORS: tuple[Vector, ...] = ("pixels", "visual_tokens")
TEXT_VECTORS: tuple[Vector, ...] = ("embeddings", "first_logits", "greedy_logits")


class GoldenCase(Frozen):
    """One question, with or without an image, and the ids in and out.

    Attributes:
        image: file name inside the bundle, or None.
        token_ids: the prompt, BOS first, the image id once where the image stands.
        greedy_ids: the 32 most likely tokens of the checkpoint in float32, going on past EOS. Every model is fed them
            while its logits are recorded or compared, so that rows of the two sets are answers to the same question.
    """

    name: str
    image: str | None
    question: str
    prompt_text: str
    token_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """Which vectors this case has."""
        return TEXT_VECTORS if self.image is None else IMAGE_VECTORS + TEXT_VECTORS


@dataclass(frozen=True)
class Recording:
    """The golden folder of an opened bundle."""

    bundle: Path
    cases: tuple[GoldenCase, ...]
    sets: dict[VectorSet, dict[str, Floats]]

    def vector(self, case: GoldenCase, name: Vector, of: VectorSet = "dequantized") -> Floats:
        """Pixels [1,3,S,S], visual_tokens [1,N,D], embeddings [1,T,D], first_logits [V] or greedy_logits [32,V]."""
        return self.sets[of][f"{case.name}.{name}"]


def write_golden(
    folder: Path,
    cases: Sequence[GoldenCase],
    sets: Mapping[VectorSet, Mapping[str, np.ndarray]],
    images: Mapping[str, Image.Image] | None = None,
) -> dict[VectorSet, str]:
    """Write the golden folder of the bundle under construction at ``folder``.

    Args:
        sets: the vectors by name; where the files hold the checkpoint's own weights "dequantized" is left out.
        images: picture by its file name inside the bundle; None when the caller has put the files there already.

    Returns:
        Each set -> the file that holds it.
    """
    for name, image in (images or {}).items():
        path = inside(folder, name, "golden image")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    for case in cases:
        assert case.image is None or (folder / case.image).is_file(), f"golden image {case.image} was not written"
    (folder / CASES_FILE).parent.mkdir(parents=True, exist_ok=True)
    for of, vectors in sets.items():
        wanted = [f"{case.name}.{vector}" for case in cases for vector in case.vectors]
        path = folder / VECTOR_FILES[of]
        save_file({name: np.ascontiguousarray(vectors[name], dtype=np.float32) for name in wanted}, path)
        path.chmod(0o644)  # safetensors makes it 0600, which a phone's app could not read after a push
    rows = [case.model_dump(mode="json") for case in cases]
    write_text_whole(folder / CASES_FILE, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return {of: VECTOR_FILES[of if of in sets else "float"] for of in VECTOR_SETS}


def read_golden(bundle: Path, manifest: Manifest) -> Recording:
    """Read the golden folder and check that it fits the manifest.

    Raises:
        UsageError: a file is missing or of the wrong shape.
    """
    path = inside(bundle, manifest.golden.cases, "golden path")
    try:
        cases = TypeAdapter(tuple[GoldenCase, ...]).validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"golden cases {path} cannot be read ({error.strerror}); export the bundle again") from error
    except ValidationError as error:
        raise UsageError(
            f"{path}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}; export the bundle again"
        ) from error
    if not any(case.image for case in cases):
        raise UsageError(
            f"{path} holds no case with an image, so the vision graph has no golden output; export the bundle again"
        )
    for case in cases:
        if case.image is not None:
            inside(bundle, case.image, "golden image")
    sets: dict[VectorSet, dict[str, Floats]] = {}
    for of in VECTOR_SETS:
        if of not in manifest.golden.vectors:
            raise UsageError(f"{bundle}: the manifest names no golden vectors '{of}'; export the bundle again")
        sets[of] = _read_vectors(inside(bundle, manifest.golden.vectors[of], "golden path"), cases, manifest)
    return Recording(bundle, cases, sets)


def _read_vectors(path: Path, cases: tuple[GoldenCase, ...], manifest: Manifest) -> dict[str, Floats]:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"golden vectors {path} cannot be read ({error}); export the bundle again") from error
    vectors = {}
    for case in cases:
        for vector in case.vectors:
            name, shape = f"{case.name}.{vector}", _shape(case, vector, manifest)
            if name not in stored or stored[name].size != int(np.prod(shape)):
                found = list(stored[name].shape) if name in stored else "nothing"
                raise UsageError(
                    f"{path}: '{name}' must have shape {list(shape)}, found {found}; export the bundle again"
                )
            vectors[name] = stored[name].astype(np.float32).reshape(shape)
    return vectors


def _shape(case: GoldenCase, vector: Vector, manifest: Manifest) -> tuple[int, ...]:
    model, size = manifest.model, manifest.image.size
    text = len(text_ids(case.token_ids, manifest.tokenizer.image_token_id))
    return {
        "pixels": (1, 3, size, size),
        "visual_tokens": (1, model.visual_tokens, model.hidden_size),
        "embeddings": (1, text, model.hidden_size),
        "first_logits": (model.vocab_size,),
        "greedy_logits": (len(case.greedy_ids), model.vocab_size),
    }[vector]
