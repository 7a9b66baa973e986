"""A model and a precision -> model.pte: three methods on XNNPACK, as ExecuTorch's own multimodal runner wants them."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from bundle.errors import missing_extra
from bundle.manifest import Graph, GraphName, Tensor
from export.contract import ExportedGraphs, ExportRequest
from export.executorch_modules import TextDecoder, TokenEmbedding, VisionEncoder, weight_sharing_copy
from export.executorch_quantize import dequantized, quantize

FILE = "model.pte"


def export_executorch(request: ExportRequest) -> ExportedGraphs:
    """Write ``model.pte`` into the request's output folder.

    Raises:
        UsageError: executorch or torchao is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and executorch warn of their own deprecated calls, hundreds of times
        _load_operators()
        twin = weight_sharing_copy(request.vlm)
        quantization = quantize(twin, request.recipe, request.chosen)
        request.progress(f"weights at {request.recipe.name}")
        programs = _trace(request, VisionEncoder(twin), TokenEmbedding(twin), TextDecoder(twin, request.context_length))
        request.progress("three graphs traced")
        _lower(request, programs)
        request.progress(f"{FILE} written")
    return ExportedGraphs(_graphs(request), quantization, dequantized(twin, request.vlm))


def _load_operators() -> None:
    """Register the operators that the graphs are written in: llama's KV cache and attention, torchao's quantization."""
    try:
        importlib.import_module("torchao")
        importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name or "executorch").split(".")[0], "executorch") from error


@torch.no_grad()
def _trace(
    request: ExportRequest, vision: VisionEncoder, embedding: TokenEmbedding, decoder: TextDecoder
) -> dict[str, torch.export.ExportedProgram]:
    text, size = _sizes(request)
    length = torch.export.Dim("length", min=1, max=request.context_length - 1)
    pixels = torch.zeros(1, 3, size, size)
    width = text.hidden_size
    ids, rows, start = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, width), torch.zeros(1, dtype=torch.long)
    return {
        "vision_encoder": torch.export.export(vision.eval(), (pixels,), strict=False),
        "token_embedding": torch.export.export(embedding.eval(), (ids,), dynamic_shapes=({1: length},), strict=False),
        "text_decoder": torch.export.export(
            decoder.eval(), (rows, start), dynamic_shapes=({1: length}, None), strict=False
        ),
    }


def _lower(request: ExportRequest, programs: dict[str, torch.export.ExportedProgram]) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    edge = to_edge_transform_and_lower(
        programs,
        partitioner={"vision_encoder": [XnnpackPartitioner()], "text_decoder": [XnnpackPartitioner()]},
        constant_methods=_constants(request),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    request.progress("lowered to XNNPACK")
    whole = edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,  # else the int8 embedding table is stored as float32
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),  # plan for the longest segment, not for the example
        )
    )
    with (request.output / FILE).open("wb") as file:
        whole.write_to_file(file)


def _constants(request: ExportRequest) -> dict[str, int | bool | list[int]]:
    """The constant methods that ExecuTorch 1.4's runners read (extension/llm/runner/constants.h)."""
    text = request.vlm.config.text_config
    return {
        "get_max_seq_len": request.context_length - 1,
        "get_max_context_len": request.context_length,
        "get_vocab_size": text.vocab_size,
        "get_bos_id": request.bos_id,
        "get_eos_ids": list(request.eos_ids),
        "get_n_layers": text.num_hidden_layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _sizes(request: ExportRequest) -> tuple[Any, Any]:
    """The decoder's config and the image size; transformers types the fields of both as unions."""
    return request.vlm.config.text_config, request.vlm.config.vision_config.image_size


def _graphs(request: ExportRequest) -> dict[GraphName, Graph]:
    text, size = _sizes(request)
    width, cache = text.hidden_size, (1, request.context_length, text.num_key_value_heads, text.head_dim)
    return {
        "vision_encoder": Graph(
            path=FILE,
            method="vision_encoder",
            inputs=(Tensor(name="pixel_values", dtype="float32", shape=(1, 3, size, size)),),
            outputs=(
                Tensor(name="visual_tokens", dtype="float32", shape=(1, request.vlm.config.visual_tokens, width)),
            ),
        ),
        "token_embedding": Graph(
            path=FILE,
            method="token_embedding",
            inputs=(Tensor(name="input_ids", dtype="int64", shape=(1, None)),),
            outputs=(Tensor(name="embeddings", dtype="float32", shape=(1, None, width)),),
        ),
        "text_decoder": Graph(
            path=FILE,
            method="text_decoder",
            inputs=(
                Tensor(name="inputs_embeds", dtype="float32", shape=(1, None, width)),
                Tensor(name="start_position", dtype="int64", shape=(1,)),
            ),
            outputs=(Tensor(name="logits", dtype="float32", shape=(1, text.vocab_size)),),
            states=tuple(
                Tensor(name=f"layers.{layer}.{name}", dtype="float32", shape=cache)
                for layer in range(text.num_hidden_layers)
                for name in ("k_cache", "v_cache")
            ),
        ),
    }
