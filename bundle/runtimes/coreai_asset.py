"""An .aimodel of Core AI -> its constants by name, and the weights as the program multiplies with them; no torch.

The program is read with the wheel's own reader. Constants have no names in it, so the exporter notes them in the
asset's metadata: position among the constants of "main" -> name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import VerificationError, missing_extra
from bundle.staging import sha256_of

PACKAGE, EXTRA = "coreai", "coreai"
WHEELS = "it has wheels for Linux on x86-64 and for macOS 26 on arm64"
PROGRAM_FILE, HASH_FILE, METADATA_FILE = "main.mlirb", "main.hash", "metadata.json"
CUSTOM, NAMES = "creatorDefinedMetadata", "alignkd.constants"
ENTRY = "main"
CONSTANT, DEQUANTIZE = "coreai.constant", "coreai.blockwise_shift_scale"
FLOATS = {"f16": np.float16, "f32": np.float32}
SIGNED = {"si4": 4, "si8": 8}


@dataclass(frozen=True)
class Constant:
    """A tensor in the program.

    Attributes:
        kind: element type as the program spells it: f16, f32, si4, si8, ...
        data: its bytes; 4-bit values lie low nibble first.
    """

    place: int
    kind: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def digest(self) -> str:
        """Tells contents apart, whatever their shape."""
        return sha256(self.data.tobytes()).hexdigest()

    def floats(self) -> NDArray[np.float32]:
        """The values of a float constant."""
        return self.data.view(FLOATS[self.kind]).reshape(self.shape).astype(np.float32)

    def integers(self) -> NDArray[np.int8]:
        """The values of a constant of 4 or 8 signed bits."""
        if SIGNED[self.kind] == 8:
            return self.data.view(np.int8).reshape(self.shape)
        nibbles = np.stack((self.data & 15, self.data >> 4), -1).reshape(-1)[: int(np.prod(self.shape))]
        return ((nibbles ^ 8).astype(np.int8) - 8).reshape(self.shape)  # two's complement of 4 bits


@dataclass(frozen=True)
class Quantized:
    """Integers and scales that the program multiplies: values[r, c] = codes[r, c] * scale[r, c // group]."""

    codes: Constant
    scales: Constant

    def floats(self) -> NDArray[np.float32]:
        """The product, in float32."""
        scales = self.scales.floats()
        rows, groups = scales.shape
        values = self.codes.integers().reshape(rows, groups, -1).astype(np.float32) * scales[..., None]
        return values.reshape(self.codes.shape)


def installed() -> str | None:
    """None when Core AI's wheel is here, else the one line that says what to install; imports nothing."""
    if find_spec(PACKAGE) is None:
        return f"coreai-core is not installed ({WHEELS}); run: pip install 'alignkd[coreai]'"
    return None


def open_asset(path: Path) -> Any:
    """The wheel's own AIModelAsset.

    Raises:
        UsageError: the wheel is not installed.
        VerificationError: the program is not the one that was written; its reader would end this process.
    """
    if find_spec(PACKAGE) is None:
        raise missing_extra("coreai-core", EXTRA)
    program, noted = path / PROGRAM_FILE, path / HASH_FILE
    if not program.is_file() or not noted.is_file():
        raise VerificationError(f"{path} is no Core AI asset: {PROGRAM_FILE} or {HASH_FILE} is missing")
    if sha256_of(program) != noted.read_bytes().hex():
        raise VerificationError(
            f"{program} was changed: its sha256 is not that of {HASH_FILE}; export the bundle again"
        )
    return import_module("coreai.authoring").AIModelAsset.load(path)


def operations(path: Path) -> Iterator[Any]:
    """The operations of the program's entry point in order.

    Raises:
        UsageError, VerificationError: as ``open_asset``.
    """
    program = open_asset(path).program  # holds what the operations point into
    yield from program._get_graph(ENTRY).bodyRegion.blocks[0].operations


def read_asset(path: Path) -> tuple[list[Constant], list[Quantized]]:
    """Every tensor with a shape in the program, and which of them are a quantized weight.

    Raises:
        UsageError, VerificationError: as ``open_asset``.
    """
    constants: list[Constant] = []
    by_value: dict[Any, Constant] = {}
    quantized: list[Quantized] = []
    for operation in operations(path):
        if operation.name == CONSTANT:
            kind = operation.result.type
            if not kind.shape:
                continue
            shape = tuple(int(size) for size in kind.shape)
            constants.append(Constant(len(constants), str(kind.element_type), shape, copy_constant(operation)))
            by_value[operation.result] = constants[-1]
        elif operation.name == DEQUANTIZE:
            codes, scales = (by_value[operand] for operand in list(operation.operands)[:2])
            quantized.append(Quantized(codes, scales))
    return constants, quantized


def copy_constant(operation: Any) -> NDArray[np.uint8]:
    """The bytes of a constant."""
    bindings = import_module("coreai._compiler._mlir_libs._coreaiIR._bindings.compiler")
    kind = operation.results[0].type
    data = np.zeros(-(-math.prod(kind.shape) * int(kind.element_type.width) // 8), np.uint8)
    bindings.copy_constant_value_to_array(constant_op=operation, destination=data)
    return data


def constant_names(path: Path) -> dict[int, str]:
    """What the exporter noted: position -> name of a weight, of its scales (NAME.scale) or of a table."""
    noted = json.loads((path / METADATA_FILE).read_text(encoding="utf-8")).get(CUSTOM, {}).get(NAMES, {})
    return {int(place): str(name) for place, name in noted.items()}


def named_constants(path: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name -> bytes of every tensor; one without a noted name goes by its position.

    Raises:
        UsageError, VerificationError: as ``open_asset``.
    """
    names = constant_names(path)
    for constant in read_asset(path)[0]:
        yield names.get(constant.place, f"constant.{constant.place}"), constant.data
