"""One graph's module -> a .pte with that one method, lowered to a backend of ExecuTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bundle.errors import missing_extra
from bundle.manifest import Backend, GraphName, Precision
from export.executorch.modules import TextDecoder, TokenEmbedding, VisionEncoder

Constants = Mapping[str, int | bool | list[int]]


def load_operators() -> None:
    """Register the operators that the graphs are written in: llama's KV cache and attention, torchao's quantization.

    Raises:
        UsageError: executorch or torchao is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "this API is experimental", once per import
            import_module("torchao")
            import_module("executorch.extension.llm.custom_ops.custom_ops")
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name or "executorch").split(".")[0], "executorch") from error


@torch.no_grad()
def traced(module: VisionEncoder | TokenEmbedding | TextDecoder, image_size: int) -> torch.export.ExportedProgram:
    """Trace a graph's module; the number of tokens stays open, up to a row less than the context."""
    module.eval()
    if isinstance(module, VisionEncoder):
        return torch.export.export(module, (torch.zeros(1, 3, image_size, image_size),), strict=False)
    length = torch.export.Dim("length", min=1, max=module.context_length - 1)
    if isinstance(module, TokenEmbedding):
        ids = torch.zeros(1, 3, dtype=torch.long)
        return torch.export.export(module, (ids,), dynamic_shapes=({1: length},), strict=False)
    rows, start = torch.zeros(1, 3, module.width), torch.zeros(1, dtype=torch.long)
    return torch.export.export(module, (rows, start), dynamic_shapes=({1: length}, None), strict=False)


def lower(
    name: GraphName, program: torch.export.ExportedProgram, constants: Constants, partitioners: list[Any], path: Path
) -> None:
    """Write ``path``: the program as method ``name``, and the constant methods.

    Args:
        partitioners: what takes the parts of the graph that a backend computes, in turn.
        constants: method -> what it answers; runners ask for them.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    logging.disable(logging.WARNING)  # partitioners tell of every operator that they take
    try:
        edge = to_edge_transform_and_lower(
            {name: program},
            partitioner={name: partitioners},
            constant_methods=dict(constants),
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
    finally:
        logging.disable(logging.NOTSET)
    whole = edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,  # else the int8 embedding table is stored as float32
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),  # plan for the longest segment, not for the example
        )
    )
    with path.open("wb") as file:
        whole.write_to_file(file)
    _let_go(program, edge.exported_program(name), whole.exported_program(name))


def _let_go(*programs: torch.export.ExportedProgram) -> None:
    """Take the weights out of programs that are written: torch's caches of traced shapes hold on to whole graphs."""
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    for program in programs:
        for module in program.graph_module.modules():
            if isinstance(module, LoweredBackendModule):
                module._processed_bytes = b""
                module._named_data_store_output = None
                _let_go(module._original_exported_program)
        program.state_dict.clear()
        program.constants.clear()


def backend_of(name: GraphName, asked: Backend) -> Backend | None:
    """What computes a graph when ``asked`` is the backend of the export; None is plain kernels.

    The embedding is a table lookup, which needs none. The decoder stays on XNNPACK: Core ML's runtime refuses keys and
    values that it was lowered with (pytorch/executorch issue 21855, open with 1.4.1), and Vulkan's passes fail on a
    start position that is read from a tensor.
    """
    if name == "token_embedding":
        return None
    return "xnnpack" if name == "text_decoder" else asked


def partitioners_of(backend: Backend | None, precision: Precision) -> list[Any]:
    """The partitioners of a backend.

    Raises:
        UsageError: the package that lowers to it is not installed.
    """
    if backend is None:
        return []
    return {"xnnpack": _xnnpack, "coreml": _coreml, "vulkan": _vulkan}[backend](precision)


def _xnnpack(precision: Precision) -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _coreml(precision: Precision) -> list[Any]:
    """iOS 18's ML program, which has int8 weights by channel and the Neural Engine's float16."""
    try:
        coremltools = import_module("coremltools")
        compiler = import_module("executorch.backends.apple.coreml.compiler").CoreMLBackend
        partitioner = import_module("executorch.backends.apple.coreml.partition").CoreMLPartitioner
    except ModuleNotFoundError as error:
        raise missing_extra((error.name or "coremltools").split(".")[0], "coreml") from error
    kind = coremltools.precision.FLOAT32 if precision == "fp32" else coremltools.precision.FLOAT16
    specs = compiler.generate_compile_specs(minimum_deployment_target=coremltools.target.iOS18, compute_precision=kind)
    return [partitioner(compile_specs=specs)]


def _vulkan(precision: Precision) -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner({"force_fp16": precision != "fp32"})]
