"""LLaMA or Qwen2 -> embed_tokens and decoder_model_merged, fused for onnxruntime, onnx-community's names."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from onnx import TensorProto

from bundle.manifest import Graph, ModelShape, Tensor
from distill.models.mobilevlm import MobileVlm
from export.model.shape import model_shape
from export.onnx.activation import activation
from export.onnx.linear import FLOAT, ModelWriter
from export.onnx.writer import MICROSOFT
from export.weights.blocks import block_size_of

LAYERS = "language_model.layers"


def write_embedding(writer: ModelWriter, vlm: MobileVlm, path: str) -> Graph:
    """input_ids [1, T] -> inputs_embeds [1, T, D]."""
    hidden = vlm.config.text_config.hidden_size
    name = "language_model.embed_tokens.weight"
    storage = writer.storage(name)
    writer.input("input_ids", TensorProto.INT64, [1, "sequence_length"])
    writer.output("inputs_embeds", FLOAT, [1, "sequence_length", hidden])
    if storage.bits in (4, 8):
        block = block_size_of(storage.group_size, hidden)
        data, scales = writer.blocked_matrix([name], storage.bits, block, flat=True)
        attributes = {"bits": storage.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        exact = hidden % block == 0
        inputs = [data, "input_ids", scales]
        rows = writer.op("GatherBlockQuantized", inputs, "inputs_embeds" if exact else None, MICROSOFT, **attributes)
        if not exact:  # the last block is padded
            bounds = [
                writer.constant(f"row_{name}", np.array([at]))
                for name, at in (("from", 0), ("to", hidden), ("axis", 2))
            ]
            writer.op("Slice", [rows, *bounds], "inputs_embeds")
    elif storage.bits == 16:
        rows = writer.op("Gather", [writer.half_table(name), "input_ids"], axis=0)
        writer.op("Cast", [rows], "inputs_embeds", to=FLOAT)
    else:
        writer.op("Gather", [writer.vector(name), "input_ids"], "inputs_embeds", axis=0)
    writer.save()
    return Graph(
        path=path,
        inputs=(Tensor(name="input_ids", dtype="int64", shape=(1, None)),),
        outputs=(Tensor(name="inputs_embeds", dtype="float32", shape=(1, None, hidden)),),
    )


def write_decoder(
    writer: ModelWriter, vlm: MobileVlm, context_length: int, path: str, half_cache: bool = False
) -> Graph:
    """inputs_embeds [1, T, D], past keys and values -> logits of the last row [1, 1, V], present keys and values.

    Args:
        half_cache: keys and values as float16. Half their memory; an attention step on 800 rows of 16 heads x 128 took
            0.75 ms instead of 0.54 (onnxruntime 1.32, one AVX-512 thread), a prefill of 256 rows 7.9 instead of 8.6.
    """
    config, shape = vlm.config.text_config, model_shape(vlm, context_length)
    graph = _declare(writer, shape, path, half_cache)
    lengths = _lengths(writer)
    cos, sin = _rotary_tables(writer, vlm, context_length, half_cache)
    residual, epsilon = "inputs_embeds", config.rms_norm_eps
    normed = _norm(writer, epsilon, residual, f"{LAYERS}.0.input_layernorm.weight")
    for layer in range(config.num_hidden_layers):
        attended = _attention(writer, shape, layer, normed, [*lengths, cos, sin], half_cache)
        normed, residual = _add_and_norm(
            writer, epsilon, residual, attended, f"{LAYERS}.{layer}.post_attention_layernorm.weight"
        )
        last = layer + 1 == config.num_hidden_layers
        following = "language_model.norm.weight" if last else f"{LAYERS}.{layer + 1}.input_layernorm.weight"
        normed, residual = _add_and_norm(
            writer, epsilon, residual, _mlp(writer, config.hidden_act, layer, normed), following
        )
    bounds = [writer.constant(f"last_{name}", np.array([value])) for name, value in LAST_ROW.items()]
    writer.linear(writer.op("Slice", [normed, *bounds]), ["lm_head.weight"], "logits")
    writer.save()
    return graph


LAST_ROW = {"start": -1, "end": np.iinfo(np.int64).max, "axis": 1}


def _declare(writer: ModelWriter, shape: ModelShape, path: str, half_cache: bool) -> Graph:
    heads, width = shape.num_kv_heads, shape.head_dim
    stored: Literal["float16", "float32"] = "float16" if half_cache else "float32"
    kind = TensorProto.FLOAT16 if half_cache else FLOAT
    writer.input("inputs_embeds", FLOAT, [1, "sequence_length", shape.hidden_size])
    writer.input("attention_mask", TensorProto.INT64, [1, "total_sequence_length"])
    writer.input("position_ids", TensorProto.INT64, [1, "sequence_length"])
    writer.output("logits", FLOAT, [1, 1, shape.vocab_size])
    pairs = [f"{layer}.{part}" for layer in range(shape.num_layers) for part in ("key", "value")]
    for pair in pairs:
        writer.input(f"past_key_values.{pair}", kind, [1, heads, "past_sequence_length", width])
        writer.output(f"present.{pair}", kind, [1, heads, "present_sequence_length", width])
    cache = (1, heads, None, width)
    return Graph(
        path=path,
        inputs=(
            Tensor(name="inputs_embeds", dtype="float32", shape=(1, None, shape.hidden_size)),
            Tensor(name="attention_mask", dtype="int64", shape=(1, None)),
            Tensor(name="position_ids", dtype="int64", shape=(1, None)),
            *(Tensor(name=f"past_key_values.{pair}", dtype=stored, shape=cache) for pair in pairs),
        ),
        outputs=(
            Tensor(name="logits", dtype="float32", shape=(1, 1, shape.vocab_size)),
            *(Tensor(name=f"present.{pair}", dtype=stored, shape=cache) for pair in pairs),
        ),
    )


def _lengths(writer: ModelWriter) -> list[str]:
    """The two int32 lengths that GroupQueryAttention asks for: last valid index [1], total length []."""
    axis = writer.constant("axis_1", np.array([1], np.int64))
    one = writer.constant("one", np.array([1], np.int64))
    valid = writer.op("ReduceSum", ["attention_mask", axis], keepdims=0)  # [1]
    last_valid = writer.op("Cast", [writer.op("Sub", [valid, one])], to=TensorProto.INT32)
    width = writer.op(
        "Gather", [writer.op("Shape", ["attention_mask"]), writer.constant("index_1", np.array(1, np.int64))]
    )
    return [last_valid, writer.op("Cast", [width], to=TensorProto.INT32)]


def _rotary_tables(writer: ModelWriter, vlm: MobileVlm, context_length: int, half: bool) -> tuple[str, str]:
    positions = torch.arange(context_length)[None]  # [1, context]
    with torch.no_grad():
        cos, sin = vlm.language_model.rotary_emb(torch.zeros(1), positions)  # [1, context, head_dim], both halves equal
    width, kind = cos.shape[-1] // 2, np.float16 if half else np.float32  # the operator takes one type for all
    return (
        writer.constant("rotary_cos", cos[0, :, :width].contiguous().numpy().astype(kind)),
        writer.constant("rotary_sin", sin[0, :, :width].contiguous().numpy().astype(kind)),
    )


def _attention(writer: ModelWriter, shape: ModelShape, layer: int, normed: str, tables: list[str], half: bool) -> str:
    block = f"{LAYERS}.{layer}.self_attn"
    qkv = _linear(writer, normed, [f"{block}.{part}_proj" for part in ("q", "k", "v")])  # [1, T, q + k + v]
    if half:
        qkv = writer.op("Cast", [qkv], to=TensorProto.FLOAT16)
    attended, _, _ = writer.node(
        "GroupQueryAttention",
        [qkv, "", "", f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", *tables, "position_ids"],
        [f"attention_{layer}", f"present.{layer}.key", f"present.{layer}.value"],
        MICROSOFT,
        num_heads=shape.num_heads,
        kv_num_heads=shape.num_kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
        scale=shape.head_dim**-0.5,
    )
    if half:
        attended = writer.op("Cast", [attended], to=FLOAT)
    return _linear(writer, attended, [f"{block}.o_proj"])  # [1, T, D]


def _mlp(writer: ModelWriter, act: str, layer: int, normed: str) -> str:
    block = f"{LAYERS}.{layer}.mlp"
    gate = activation(writer, act, _linear(writer, normed, [f"{block}.gate_proj"]))
    product = writer.op("Mul", [gate, _linear(writer, normed, [f"{block}.up_proj"])])  # [1, T, F]
    return _linear(writer, product, [f"{block}.down_proj"])  # [1, T, D]


def _linear(writer: ModelWriter, x: str, layers: list[str]) -> str:
    """``ModelWriter.linear`` with the layers' own biases, if they have any: Qwen2's q, k and v do."""
    return writer.linear(x, [f"{layer}.weight" for layer in layers], bias=writer.bias_of(layers))


def _add_and_norm(writer: ModelWriter, epsilon: float, residual: str, update: str, norm: str) -> tuple[str, str]:
    """Add ``update`` to the residual stream -> (its RMS norm, the new residual stream).

    Not SkipSimplifiedLayerNormalization, which does both at once: 46 us on a row of 2048 against 23 for these two
    (onnxruntime 1.32, one AVX-512 thread of a busy machine, CPU time).
    """
    total = writer.op("Add", [residual, update])
    return _norm(writer, epsilon, total, norm), total


def _norm(writer: ModelWriter, epsilon: float, x: str, norm: str) -> str:
    return writer.op("RMSNormalization", [x, writer.vector(norm)], axis=-1, epsilon=epsilon)
