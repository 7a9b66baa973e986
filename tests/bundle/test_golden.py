"""bundle.golden: round trip on disk, and golden folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundle.errors import UsageError
from bundle.golden import read_golden, write_golden
from bundle.manifest import Golden, Manifest, read_manifest


def golden_with(manifest: Manifest, **changes: object) -> Golden:
    """The manifest's golden entry with fields replaced."""
    return manifest.golden.model_copy(update=changes)


def test_what_is_written_is_read(numpy_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(numpy_bundle)
    first = read_golden(numpy_bundle, manifest)
    assert [case.name for case in first.cases] == ["stripes", "text"]
    other = tmp_path / "other"
    (other / "golden").mkdir(parents=True)
    (other / "golden/stripes.png").write_bytes((numpy_bundle / "golden/stripes.png").read_bytes())
    half = {name: value / 2 for name, value in first.sets["float"].items()}
    files = write_golden(other, first.cases, {"float": first.sets["float"], "dequantized": half})
    assert files == {"float": "golden/float.safetensors", "dequantized": "golden/dequantized.safetensors"}
    again = read_golden(other, manifest.model_copy(update={"golden": golden_with(manifest, vectors=files)}))
    assert again.cases == first.cases
    for of, wanted in (("float", first.sets["float"]), ("dequantized", half)):
        assert again.sets[of].keys() == wanted.keys()
        assert all(np.array_equal(again.sets[of][name], wanted[name]) for name in wanted)
    case = again.cases[0]
    assert np.array_equal(again.vector(case, "first_logits"), half["stripes.first_logits"]), "what the files hold"
    assert np.array_equal(again.vector(case, "first_logits", "float"), first.sets["float"]["stripes.first_logits"])


def test_one_file_holds_both_sets_where_the_weights_are_the_checkpoints(numpy_bundle: Path, tmp_path: Path) -> None:
    first = read_golden(numpy_bundle, read_manifest(numpy_bundle))
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden/stripes.png").write_bytes((numpy_bundle / "golden/stripes.png").read_bytes())
    files = write_golden(tmp_path, first.cases, {"float": first.sets["float"]})
    assert files == dict.fromkeys(("float", "dequantized"), "golden/float.safetensors")
    assert sorted(path.name for path in (tmp_path / "golden").glob("*.safetensors")) == ["float.safetensors"]


def test_a_case_without_image_has_no_image_vectors(numpy_bundle: Path) -> None:
    names = read_golden(numpy_bundle, read_manifest(numpy_bundle)).sets["dequantized"]
    assert "stripes.pixels" in names and "text.pixels" not in names and "text.greedy_logits" in names


def test_folders_that_do_not_fit_are_one_line(numpy_bundle: Path) -> None:
    manifest = read_manifest(numpy_bundle)
    vectors, cases = numpy_bundle / "golden/float.safetensors", numpy_bundle / "golden/cases.json"
    whole, listed = load_file(vectors), json.loads(cases.read_text())
    one = golden_with(manifest, vectors={"float": "golden/float.safetensors"})
    with pytest.raises(UsageError, match="names no golden vectors 'dequantized'"):
        read_golden(numpy_bundle, manifest.model_copy(update={"golden": one}))

    save_file({**whole, "stripes.pixels": whole["stripes.pixels"][..., :8]}, vectors)
    with pytest.raises(UsageError, match=r"'stripes.pixels' must have shape \[1, 3, 16, 16\], found \[1, 3, 16, 8\]"):
        read_golden(numpy_bundle, manifest)
    save_file({name: value for name, value in whole.items() if name != "text.first_logits"}, vectors)
    with pytest.raises(UsageError, match="'text.first_logits' must have shape .* found nothing"):
        read_golden(numpy_bundle, manifest)
    vectors.write_bytes(b"\xff" * 64)
    with pytest.raises(UsageError, match="float.safetensors cannot be read"):
        read_golden(numpy_bundle, manifest)

    for content, message in (
        (json.dumps(listed[1:]), "holds no case with an image"),
        (json.dumps([{**listed[0], "image": "../../secret.png"}]), "leaves its folder"),
        (json.dumps([{"name": "x"}]), "Field required"),
        ("no json", "Invalid JSON"),
    ):
        cases.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_golden(numpy_bundle, manifest)
    cases.unlink()
    with pytest.raises(UsageError, match="cases.json cannot be read"):
        read_golden(numpy_bundle, manifest)
