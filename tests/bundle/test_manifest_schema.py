"""The committed JSON Schema is today's manifest, and a written manifest obeys it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from bundle.manifest import MANIFEST_FILE, SCHEMA_FILE, json_schema, read_manifest, write_manifest


def test_the_committed_schema_is_current() -> None:
    regenerate = "from bundle.manifest import *; SCHEMA_FILE.write_text(json_schema())"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema(), f'run: python -c "{regenerate}"'


def test_a_written_manifest_obeys_the_schema(numpy_bundle: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    written = json.loads((numpy_bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written, schema)
    for broken in (
        {**written, "target": "tpu"},
        {**written, "more": 1},
        {k: v for k, v in written.items() if k != "files"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_reading_and_writing_a_manifest_changes_no_byte(numpy_bundle: Path) -> None:
    before = (numpy_bundle / MANIFEST_FILE).read_bytes()
    write_manifest(numpy_bundle, read_manifest(numpy_bundle))
    assert (numpy_bundle / MANIFEST_FILE).read_bytes() == before
