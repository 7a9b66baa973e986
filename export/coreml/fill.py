"""Converted functions and the model's weights, one at a time -> an .mlpackage; the same bytes on every run.

Functions of one package share the weights that have the same name, and other constants of the same value.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.runtimes.mil_graph import block_of
from bundle.runtimes.mil_proto import DATA_FOLDER, MODEL_FILE, WEIGHT_FILE, model_proto
from bundle.runtimes.mil_weights import FLOAT16, FLOAT32, shape_of
from export.coreml.compress import INT4, INT8, UINT4, Constant, Packed
from export.coreml.convert import Converted, load_coremltools, plain_name

MAIN = "main"  # the function of a package that has one
CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"
BLOB_FILE = "@model_path/weights/weight.bin"
ITEMS = {
    "com.apple.CoreML/weights": ("CoreML Model Weights", "weights"),
    MODEL_FILE: ("CoreML Model Specification", "model.mlmodel"),
}
# Name and shape of a placeholder -> what stands for it
Weights = Callable[[str, tuple[int, ...]], Packed]


def write_package(
    package: Path, functions: Mapping[str, Converted], placeholders: frozenset[str], load: Weights
) -> None:
    """Write the package.

    Args:
        functions: name -> function; the last one is what a program gets that asks for none. Alone it is ``MAIN``.
        placeholders: constants, by ``flat_name``, whose values ``load`` gives; each is asked for once.
    """
    blobs = _Blobs(package / DATA_FOLDER / WEIGHT_FILE)
    for converted in functions.values():
        block = block_of(converted.spec)
        for operation in block.operations:
            name = operation.outputs[0].name if operation.outputs else ""
            if operation.type != "const":
                continue
            if plain_name(name) in placeholders:
                _fill(operation, blobs.weight(plain_name(name), operation, load))
            elif name in converted.constants:
                operation.attributes["val"].blobFileValue.offset = blobs.constant(converted.constants[name])
    blobs.close()
    spec = _one_spec(functions)
    path = package / DATA_FOLDER / MODEL_FILE
    path.write_bytes(spec.SerializeToString(deterministic=True))
    _write_items(package / "Manifest.json")


class _Blobs:
    """weight.bin while it is written; coremltools owns the format."""

    def __init__(self, path: Path) -> None:
        load_coremltools()
        from coremltools.libmilstoragepython import _BlobStorageWriter

        path.parent.mkdir(parents=True)
        self._writer: Any = _BlobStorageWriter(str(path))
        self._weights: dict[str, tuple[Packed, dict[str, int]]] = {}
        self._constants: dict[tuple[str, bytes], int] = {}

    def weight(self, name: str, operation: Any, load: Weights) -> tuple[Packed, dict[str, int]]:
        """Kind, types and offsets of a placeholder's blobs; values are let go once they are written."""
        if name not in self._weights:
            packed = load(name, shape_of(operation.outputs[0].type.tensorType))
            offsets = {parameter: self._write(constant) for parameter, constant in packed.parts.items()}
            hollow = {
                parameter: Constant(np.broadcast_to(np.zeros(1, np.uint8), constant.values.shape), constant.dtype)
                for parameter, constant in packed.parts.items()
            }
            self._weights[name] = Packed(packed.kind, hollow), offsets
        return self._weights[name]

    def constant(self, values: NDArray[Any]) -> int:
        """The offset of a small constant, written once."""
        key = (str(values.dtype), values.tobytes())
        if key not in self._constants:
            dtype = {"float16": FLOAT16, "float32": FLOAT32}.get(str(values.dtype), 0)
            self._constants[key] = self._write(Constant(values, dtype))
        return self._constants[key]

    def close(self) -> None:
        """The writer finishes the file when it goes."""
        self._writer = None

    def _write(self, constant: Constant) -> int:
        flat = np.ascontiguousarray(constant.values).reshape(-1)
        if constant.dtype == FLOAT16:
            return int(self._writer.write_fp16_data(flat.view(np.uint16)))
        name = {INT4: "int4", UINT4: "uint4", INT8: "int8", FLOAT32: "float"}.get(constant.dtype, str(flat.dtype))
        return int(getattr(self._writer, f"write_{name}_data")(flat))


def _fill(operation: Any, stored: tuple[Packed, dict[str, int]]) -> None:
    """Turn the constant operation into what stands for the weight; readers find it under the same name."""
    packed, offsets = stored
    if packed.kind == "const":
        operation.attributes["val"].blobFileValue.offset = offsets["val"]
        return
    operation.type = packed.kind
    del operation.attributes["val"]
    for parameter, constant in packed.parts.items():
        value = operation.inputs[parameter].arguments.add().value
        value.type.tensorType.dataType = constant.dtype
        value.type.tensorType.rank = constant.values.ndim
        for size in constant.values.shape:
            value.type.tensorType.dimensions.add().constant.size = size
        value.blobFileValue.fileName = BLOB_FILE
        value.blobFileValue.offset = offsets[parameter]


def _one_spec(functions: Mapping[str, Converted]) -> Any:
    """The Model message: of one function as it was converted, of several as coremltools' save_multifunction has it."""
    if list(functions) == [MAIN]:
        spec = functions[MAIN].spec
        spec.description.metadata.userDefined.pop(CONVERSION_DATE, None)
        return spec
    spec = model_proto().Model()
    for name, converted in functions.items():
        spec.specificationVersion = converted.spec.specificationVersion
        spec.mlProgram.version = converted.spec.mlProgram.version
        spec.mlProgram.functions[name].CopyFrom(converted.spec.mlProgram.functions[MAIN])
        described, wanted = spec.description.functions.add(name=name), converted.spec.description
        described.input.extend(wanted.input)
        described.output.extend(wanted.output)
        described.state.extend(wanted.state)
        spec.description.defaultFunctionName = name
    return spec


def _write_items(path: Path) -> None:
    """The package's own manifest; its ids are made of the paths, so that they are the same on every run."""
    ids = {item: str(uuid.uuid5(uuid.NAMESPACE_URL, item)).upper() for item in ITEMS}
    entries = {
        ids[item]: {"author": "com.apple.CoreML", "description": description, "name": name, "path": item}
        for item, (description, name) in ITEMS.items()
    }
    content = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": ids[MODEL_FILE]}
    path.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")
