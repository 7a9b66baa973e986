"""Graph files of a bundle -> a digest of every constant in them, so that a changed weight is told from a changed graph.

Written to golden/constants.json when the vectors are recorded. Names are the file's own: ONNX initializers, constants
of an ML program, what an .aimodel's metadata calls them, keys of a .pte's named data (ExecuTorch makes them of the
contents), places in its constant segment.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bundle.errors import UsageError, missing_extra
from bundle.manifest import GraphName, Manifest, Target
from bundle.staging import inside, write_text_whole

CONSTANTS_FILE = "golden/constants.json"
DIGEST_CHARACTERS = 16
Digests = dict[str, str]
# Tables of the rotary embedding by their exporters' names; a .pte does not keep names.
TABLES = ("rotary_", "cos", "sin")


def record_constants(bundle: Path, manifest: Manifest) -> None:
    """Write the digests of the bundle under construction."""
    by_path: dict[str, Digests] = {}  # the methods of a .pte are one file
    for name, graph in manifest.graphs.items():
        if graph.path not in by_path:
            by_path[graph.path] = constant_digests(bundle, manifest, name)
    digests = {name: by_path[graph.path] for name, graph in manifest.graphs.items()}
    write_text_whole(bundle / CONSTANTS_FILE, json.dumps(digests, indent=0, sort_keys=True) + "\n")


def changed_constants(bundle: Path, manifest: Manifest, graph: GraphName) -> list[str]:
    """Names of the graph's constants that are not those with which the vectors were recorded.

    Raises:
        UsageError: the record cannot be read, or the package that reads the target's files is not installed.
    """
    path = inside(bundle, manifest.golden.constants, "golden path")
    try:
        recorded: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))[graph]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} holds no digests of '{graph}' ({error}); export the bundle again") from error
    found = constant_digests(bundle, manifest, graph)
    return sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))


def constant_digests(bundle: Path, manifest: Manifest, graph: GraphName) -> Digests:
    """Name -> digest of every constant of one graph (of a .pte: of the whole file).

    Raises:
        UsageError: the package that reads the target's files is not installed.
    """
    path = inside(bundle, manifest.graphs[graph].path, "graph path")
    return {name: _digest(part) for name, part in READERS[manifest.target](path)}


def _digest(part: Any) -> str:
    return sha256(part).hexdigest()[:DIGEST_CHARACTERS]


def _onnx(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        onnx = import_module("onnx")
    except ModuleNotFoundError as error:
        raise missing_extra("onnx", "onnx") from error
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            yield tensor.name, onnx.numpy_helper.to_array(tensor).tobytes()
            continue
        data = inside(path.parent, place["location"], "external data")
        yield tensor.name, np.memmap(data, np.uint8, "r", int(place["offset"]), (int(place["length"]),))


def _coreml(path: Path) -> Iterator[tuple[str, Any]]:
    from bundle.runtimes.mil_graph import blocks_of
    from bundle.runtimes.mil_proto import read_spec, weight_path
    from bundle.runtimes.mil_weights import WeightFile

    weights = WeightFile(weight_path(path))
    seen: dict[int, str] = {}  # functions of a package share weights
    for block in blocks_of(read_spec(path)):
        for operation in block.operations:
            for key, value in _blobs(operation):
                offset = int(value.blobFileValue.offset)
                if offset not in seen:
                    name = f"{key} at {offset}" if key in seen.values() else key
                    seen[offset] = name
                    yield name, np.ascontiguousarray(weights.blob(offset))


def _blobs(operation: Any) -> Iterator[tuple[str, Any]]:
    """Name and place of every constant of an operation that lies in weight.bin."""
    values = [*operation.attributes.items()] if operation.type == "const" else []
    values += [
        (name, argument.arguments[0].value)
        for name, argument in operation.inputs.items()
        if argument.arguments and argument.arguments[0].WhichOneof("binding") == "value"
    ]
    for name, value in values:
        if value.WhichOneof("value") == "blobFileValue":
            yield operation.outputs[0].name if name == "val" else f"{operation.outputs[0].name}.{name}", value


def _coreai(path: Path) -> Iterator[tuple[str, Any]]:
    from bundle.runtimes.coreai_asset import named_constants

    yield from named_constants(path)


def _executorch(path: Path) -> Iterator[tuple[str, Any]]:
    from bundle.pte import open_pte

    opened = open_pte(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for key, start, end in opened.constants():
            yield key, whole[start:end]


READERS: dict[Target, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "onnx": _onnx,
    "executorch": _executorch,
    "coreml": _coreml,
    "coreai": _coreai,
}
