"""What the frame hands to each target's exporter, and what it gets back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle.manifest import Backend, CoreMl, Engine, Graph, GraphName, GraphQuantization, Precision, Target
from distill.models.mobilevlm import MobileVlm
from export.job.work_folder import WorkFolder
from export.model.graph_weights import EMBEDDING
from export.weights.chosen import ChosenWeights
from export.weights.plan import StoragePlan
from export.weights.recipe import RECIPES, VISION_LINEARS, Recipe, Storage, storage_of

INT4_GROUP = 32
PALETTE_ROWS = 16


@dataclass(frozen=True)
class OnnxOptions:
    """What only the ONNX target offers."""

    int4_embedding: bool = False  # the embedding table at 4 bits too
    fp16_cache: bool = False  # keys and values as float16

    @property
    def storages(self) -> dict[str, Storage]:
        """Weights that are stored otherwise than the recipe says."""
        return {EMBEDDING: Storage(4, INT4_GROUP)} if self.int4_embedding else {}


@dataclass(frozen=True)
class ExecutorchOptions:
    """What only the ExecuTorch target offers."""

    backend: Backend = "xnnpack"  # of the vision encoder; the decoder's cache needs XNNPACK (executorch/lower.py)
    float_vision: bool = False  # vision matrices as float32 at int4 and int8, on XNNPACK

    def storages(self, shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> dict[str, Storage]:
        """Weights that are stored otherwise than the recipe says."""
        if precision not in ("int4", "int8") or not (self.float_vision or self.backend == "vulkan"):
            return {}
        # Vulkan's partitioner left torchao's 8-bit weights to be dequantized before every product; halves it takes
        storage = Storage(32 if self.float_vision else 16, None)
        return {name: storage for name in shapes if re.fullmatch(VISION_LINEARS, name)}


@dataclass(frozen=True)
class CoreMlOptions:
    """What only the Core ML target offers."""

    engine: Engine = "gpu"

    def storages(self, shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> dict[str, Storage]:
        """Weights that are stored otherwise than the recipe says.

        The Neural Engine reads 4-bit weights from tables of 16 values, one for 16 output channels; on integers with
        scales per block its compiler gives up (docs/exports.md).
        """
        if self.engine == "gpu":
            return {}
        return {
            name: Storage(4, None, PALETTE_ROWS)
            for name, shape in shapes.items()
            if storage_of(name, shape, precision).bits == 4 and shape[0] % PALETTE_ROWS == 0
        }


def storages(
    shapes: Mapping[str, tuple[int, ...]],
    precision: Precision,
    onnx: OnnxOptions,
    executorch: ExecutorchOptions,
    coreml: CoreMlOptions,
) -> dict[str, Storage]:
    """Weights that are stored otherwise than the recipe says; options of other targets are at their defaults."""
    return onnx.storages | executorch.storages(shapes, precision) | coreml.storages(shapes, precision)


@dataclass(frozen=True)
class ExportRequest:
    """One model to be written at one precision into the bundle directory under construction."""

    vlm: MobileVlm  # float32, evaluation mode; exporters must not change it. On the meta device when streamed
    precision: Precision
    context_length: int  # KV cache rows
    tokenizer_path: Path  # tokenizer.model or tokenizer.json of the checkpoint
    eos_ids: tuple[int, ...]
    bos_id: int | None  # None: prompts begin with no mark of their own
    output: Path  # write graph files here and nowhere else
    progress: Callable[[str], None]  # one short line per finished step
    weights: Mapping[str, torch.Tensor] | None = None  # lazy, of a streamed model; None: those of ``vlm``
    work: WorkFolder | None = None  # where finished graphs are noted, to be used again after a kill
    onnx: OnnxOptions = OnnxOptions()
    executorch: ExecutorchOptions = ExecutorchOptions()
    coreml: CoreMlOptions = CoreMlOptions()
    own_recipe: Recipe | None = None  # None: the precision's
    chosen: ChosenWeights | None = None  # codes to store as they are; ``weights`` hold what they stand for

    @property
    def recipe(self) -> Recipe:
        """How wide each weight is stored, but for what the target's options say."""
        return self.own_recipe or RECIPES[self.precision]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """State-dict name -> shape."""
        return {name: tuple(weight.shape) for name, weight in self.vlm.state_dict().items()}

    def plan(self, target: Target) -> StoragePlan:
        """How the target stores each weight, by the recipe and its own options."""
        overrides = storages(self.shapes, self.precision, self.onnx, self.executorch, self.coreml)
        return StoragePlan(target, self.precision, overrides, self.recipe, self.chosen)


@dataclass(frozen=True)
class ExportedGraphs:
    """The written graphs, how they are quantized, and the weights that the files really hold.

    Attributes:
        dequantized: MobileVlm state-dict name -> float32 tensor, read back from the quantized artefact, for every
            weight that quantization or rounding changed. The golden vectors are recorded with these weights, so that
            the verifier separates an error of the graph from the error of quantization. A lazy mapping may read each
            weight from the files when asked: a full copy of a large model need not fit into memory.
        coreml: what a runner needs to know of target coreml.
    """

    graphs: dict[GraphName, Graph]
    quantization: dict[GraphName, GraphQuantization]
    dequantized: Mapping[str, torch.Tensor]
    coreml: CoreMl | None = None
