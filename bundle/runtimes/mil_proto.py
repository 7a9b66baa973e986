"""A Core ML package (.mlpackage) -> its specification and the path of its weights, without importing coremltools."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from bundle.errors import UsageError, missing_extra
from bundle.staging import inside

DATA_FOLDER = "Data"
MODEL_FILE = "com.apple.CoreML/model.mlmodel"
WEIGHT_FILE = "com.apple.CoreML/weights/weight.bin"
PROTO_PACKAGE = "bundle.runtimes._coremltools_proto"


def coremltools_folder() -> Path | None:
    """Where coremltools is installed, or None; looking does not import it."""
    spec = importlib.util.find_spec("coremltools")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


@cache
def model_proto() -> Any:
    """coremltools' Model_pb2 module, loaded from its file.

    ``import coremltools`` imports torch when torch is installed (7 s, 700 MB), and reading a package needs neither.

    Raises:
        UsageError: coremltools is not installed.
    """
    folder = coremltools_folder()
    if folder is None:
        raise missing_extra("coremltools", "coreml")
    spec = ModuleSpec(PROTO_PACKAGE, loader=None, is_package=True)
    spec.submodule_search_locations = [str(folder / "proto")]
    sys.modules[PROTO_PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PROTO_PACKAGE}.Model_pb2")


def read_spec(package: Path) -> Any:
    """The ``Model`` message of an .mlpackage.

    Raises:
        UsageError: there is no package, or its specification is damaged.
    """
    spec = model_proto().Model()
    from google.protobuf.message import DecodeError  # comes with coremltools, not with the base install

    path = _item(package, MODEL_FILE)
    try:
        spec.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UsageError(f"{path} is damaged ({error}); copy or export the bundle again") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise UsageError(f"{package} holds a '{spec.WhichOneof('Type')}', not an ML program; export the bundle again")
    return spec


def weight_path(package: Path) -> Path:
    """The package's weight file; it is absent when all constants are in the specification."""
    return package / DATA_FOLDER / WEIGHT_FILE


def _item(package: Path, name: str) -> Path:
    manifest = package / "Manifest.json"
    if not manifest.is_file():
        raise UsageError(f"{package} is no Core ML package: it has no Manifest.json; export the bundle again")
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["itemInfoEntries"].values()
        listed = [str(entry["path"]) for entry in entries]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{manifest} is damaged ({error}); copy or export the bundle again") from error
    path = inside(package / DATA_FOLDER, name, "package item")
    if name not in listed or not path.is_file():
        raise UsageError(f"{package} is no Core ML package: it has no {name}; export the bundle again")
    return path
