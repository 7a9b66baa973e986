"""Nodes and weights -> model.onnx and model.onnx_data, streamed: memory holds one weight at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

Array = NDArray[Any]

MICROSOFT = "com.microsoft"  # onnxruntime's own operators: MatMulNBits, GroupQueryAttention, ...
OPSETS = (helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1))
IR_VERSION = 10
INLINE_BYTES = 1024  # smaller constants stay in the graph file, so that shape inference sees them
ALIGN_BYTES = 4096  # a page: runtimes map external data straight from the file


class GraphWriter:
    """One ONNX file under construction; external data goes to disk as it is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data_path = path.with_name(path.name + "_data")
        self._data = self.data_path.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}
        self._names: set[str] = set()

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in ``shape`` names a dynamic dimension."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def has(self, name: str) -> bool:
        """Whether an initializer of that name was added."""
        return name in self._names

    def constant(self, name: str, values: Array) -> str:
        """Add an initializer; large ones go to the data file."""
        if values.nbytes >= INLINE_BYTES:
            self.stream(name, values.dtype, values.shape, [values])
            return name
        tensor = self._declare(name, values.dtype, values.shape)
        tensor.raw_data = np.ascontiguousarray(values).tobytes()
        return name

    def stream(self, name: str, dtype: np.dtype[Any], shape: Sequence[int], parts: Iterable[Array]) -> int:
        """Add an external initializer from parts, one after the other in memory -> its offset in the data file."""
        tensor = self._declare(name, dtype, shape)
        self._data.write(bytes(-self._data.tell() % ALIGN_BYTES))
        offset = self._data.tell()
        for part in parts:
            np.ascontiguousarray(part).tofile(self._data)
        length = self._data.tell() - offset
        assert length == dtype.itemsize * int(np.prod(shape)), f"{name}: parts do not fill {list(shape)}"
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.data_path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return offset

    def _declare(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=list(shape))
        assert name not in self._names, name
        self._names.add(name)
        self._initializers.append(tensor)
        return tensor

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str] | int = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node -> the names of its outputs, made up where a number is given."""
        count = self._counts[op] = self._counts.get(op, 0) + 1
        names = [f"{op}_{count}_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(op, list(inputs), names, name=f"{op}_{count}", domain=domain, **attributes))
        return names

    def op(self, op: str, inputs: Sequence[str], output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node of one output -> its name."""
        return self.node(op, inputs, 1 if output is None else [output], domain, **attributes)[0]

    def save(self) -> None:
        """Write the graph and close the data file."""
        self._data.close()
        if self.data_path.stat().st_size == 0:
            self.data_path.unlink()
        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, self._initializers)
        model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION, producer_name="alignkd")
        self.path.write_bytes(model.SerializeToString(deterministic=True))
