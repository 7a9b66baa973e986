"""A model's matrices at the recipe's precision -> nodes of the graph, and what the file holds afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.job.meter import Meter
from export.onnx.stored import Stored, StoredBlocks, StoredHalves
from export.onnx.writer import MICROSOFT, GraphWriter
from export.weights.blocks import CHUNK_VALUES, Bytes, Floats, block_size_of, pack
from export.weights.chosen import ChosenWeights
from export.weights.recipe import Recipe, Storage, storage_of

ACCURACY_INT8 = 4  # MatMulNBits quantizes activations to int8 per block; its integer kernels need it
FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class WeightSource:
    """The model's weights by their state-dict names, and how to store them.

    Attributes:
        weights: may be lazy; each is asked for once and let go.
        overrides: storage of single weights, before the recipe.
        meter: told of every weight value that was read.
        chosen: weights that come with scales, at which they are whole levels.
    """

    weights: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    recipe: Recipe
    overrides: Mapping[str, Storage]
    meter: Meter
    chosen: ChosenWeights | None = None


class ModelWriter(GraphWriter):
    """A GraphWriter that takes the model's weights by their state-dict names and stores them by the recipe."""

    def __init__(self, path: Path, source: WeightSource) -> None:
        super().__init__(path)
        self._source = source
        self.stored: dict[str, Stored] = {}  # every weight that the file holds in another form than float32

    def weight(self, name: str) -> Floats:
        """One weight of the model as float32."""
        self._source.meter.advance(math.prod(self.shape(name)))
        return self._source.weights[name].detach().float().numpy()

    def chunks(self, name: str, count: int) -> Iterator[Floats]:
        """One weight of the model as float32, in ``count`` pieces of its rows."""
        for rows in self._source.weights[name].detach().tensor_split(count):
            self._source.meter.advance(rows.numel())
            yield rows.float().numpy()

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's shape, without reading it."""
        return self._source.shapes[name]

    def bias_of(self, layers: list[str]) -> str | None:
        """Add the biases of layers that lie side by side -> their initializer; None where the layers have none."""
        names = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in self._source.shapes]
        if not names:
            return None
        assert len(names) == len(layers), names
        return self.constant(names[0], np.concatenate([self.weight(name) for name in names]))

    def storage(self, name: str) -> Storage:
        """How the recipe stores a weight."""
        return self._source.overrides.get(name) or storage_of(name, self.shape(name), self._source.recipe)

    def vector(self, name: str) -> str:
        """Add a norm's or bias's weight -> its initializer."""
        return self.constant(name, self.weight(name))

    def linear(self, x: str, names: list[str], output: str | None = None, bias: str | None = None) -> str:
        """x [.., K] times the transposed matrices of ``names``, which lie side by side in the result -> [.., sum of N].

        Args:
            names: state-dict names of matrices that share K and storage, e.g. q, k and v.
            output: name of the result, made up when None.
            bias: initializer to add, or None.
        """
        storage = self.storage(names[0])
        assert all(self.storage(name) == storage for name in names), names
        if storage.bits in (4, 8):
            return self._blocked_linear(x, names, storage, output, bias)
        matrix = self.float_tensor(names, storage, transpose=True)
        product = self.op("MatMul", [x, matrix], output if bias is None else None)
        return product if bias is None else self.op("Add", [product, bias], output)

    def _blocked_linear(self, x: str, names: list[str], storage: Storage, output: str | None, bias: str | None) -> str:
        columns = self.shape(names[0])[1]
        rows = sum(self.shape(name)[0] for name in names)
        block = block_size_of(storage.group_size, columns)
        data, scales = self.blocked_matrix(names, storage.bits, block)
        inputs = [x, data, scales] + ([] if bias is None else ["", "", bias])
        attributes = {
            "K": columns,
            "N": rows,
            "bits": storage.bits,
            "block_size": block,
            "accuracy_level": ACCURACY_INT8,
        }
        return self.op("MatMulNBits", inputs, output, MICROSOFT, **attributes)

    def blocked_matrix(self, names: list[str], bits: int, block: int, flat: bool = False) -> tuple[str, str]:
        """Quantize and add matrices, one after the other -> names of their data and scale initializers.

        Args:
            flat: data as [N, bytes] for GatherBlockQuantized, not [N, blocks, bytes] as MatMulNBits has it.
        """
        scales: list[Floats] = []
        columns = self.shape(names[0])[1]
        rows = [self.shape(name)[0] for name in names]
        blocks, blob = -(-columns // block), block * bits // 8

        def parts() -> Iterator[Bytes]:
            for name, count in zip(names, rows, strict=True):
                chosen, first = self._chosen_scales(name), 0
                for chunk in self.chunks(name, -(-count * columns // CHUNK_VALUES)):
                    mine = None if chosen is None else chosen[first : first + len(chunk)]
                    packed = pack(chunk, bits, block, mine)
                    scales.append(packed.scales)
                    first += len(chunk)
                    yield packed.data

        shape = [sum(rows), blocks * blob] if flat else [sum(rows), blocks, blob]
        data_name, scale_name = f"{names[0]}_q{bits}", f"{names[0]}_scales"
        data_at = self.stream(data_name, np.dtype(np.uint8), shape, parts())
        scales_at = self.stream(scale_name, np.dtype(np.float32), [sum(rows), blocks], scales)
        first = 0
        for name, count in zip(names, rows, strict=True):
            self.stored[name] = StoredBlocks(
                file=self.data_path.name,
                data_at=data_at,
                scales_at=scales_at,
                first=first,
                rows=count,
                bits=bits,
                block=block,
                columns=columns,
            )
            first += count
        return data_name, scale_name

    def _chosen_scales(self, name: str) -> Floats | None:
        chosen = self._source.chosen
        return chosen.coded(name).scales.numpy() if chosen is not None and name in chosen else None

    def float_tensor(self, names: list[str], storage: Storage, transpose: bool = False) -> str:
        """Add weights as float32 or float16, side by side when there are several -> the name of their float32 value."""
        values = np.concatenate([self.weight(name) for name in names]) if len(names) > 1 else self.weight(names[0])
        if transpose:
            values = np.ascontiguousarray(values.T)
        if storage.bits == 32:
            return self.constant(names[0], values)
        return self.op("Cast", [self._half_tensor(names, values, transpose)], to=FLOAT)

    def half_table(self, name: str) -> str:
        """Add a table as float16 -> its initializer, for a caller that casts the rows it takes."""
        return self._half_tensor([name], self.weight(name), transpose=False)

    def _half_tensor(self, names: list[str], values: Floats, transpose: bool) -> str:
        halves = values.astype(np.float16)
        offset = self.stream(f"{names[0]}_half", halves.dtype, halves.shape, [halves])
        self._remember_halves(names, offset, halves.shape, transpose)
        return f"{names[0]}_half"

    def _remember_halves(self, names: list[str], offset: int, shape: tuple[int, ...], transpose: bool) -> None:
        first = 0
        for name in names:
            count = self.shape(name)[0]
            self.stored[name] = StoredHalves(
                file=self.data_path.name, data_at=offset, shape=shape, first=first, rows=count, transposed=transpose
            )
            first += count
