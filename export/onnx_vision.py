"""CLIP tower to the selected layer, and LDPv2 -> vision_encoder: pixel_values [1,3,S,S] to image_features [1,N,D]."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import CLIPVisionConfig

from bundle.errors import UsageError
from bundle.manifest import Graph, Tensor
from distill.models.mobilevlm import MobileVlm
from export.onnx_linear import FLOAT, ModelWriter
from export.onnx_token_linear import token_linear
from export.onnx_writer import MICROSOFT

LAYERS = "vision_tower.encoder.layers"
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "quick_gelu": ("QuickGelu", {"alpha": 1.702}),
    "gelu": ("Gelu", {}),
}


def write_vision_encoder(writer: ModelWriter, vlm: MobileVlm, path: str) -> Graph:
    """Write the graph of ``vlm.encode_images`` for one image."""
    config, hidden = vlm.config.vision_config, vlm.config.text_config.hidden_size
    assert isinstance(config, CLIPVisionConfig)  # export/frame.py lets no other through
    if config.hidden_act not in ACTIVATIONS:
        raise UsageError(
            f"vision hidden_act '{config.hidden_act}' is not supported on onnx; supported: {', '.join(ACTIVATIONS)}"
        )
    size, tokens = config.image_size, vlm.config.visual_tokens
    assert isinstance(size, int)
    writer.input("pixel_values", FLOAT, [1, 3, size, size])
    writer.output("image_features", FLOAT, [1, tokens, hidden])
    features = _tower(writer, config, vlm.config.tower_layers)  # [1, P, D_v]
    _projector(writer, features, vlm.config.patch_grid, hidden)
    writer.save()
    return Graph(
        path=path,
        inputs=(Tensor(name="pixel_values", dtype="float32", shape=(1, 3, size, size)),),
        outputs=(Tensor(name="image_features", dtype="float32", shape=(1, tokens, hidden)),),
    )


def _tower(writer: ModelWriter, config: CLIPVisionConfig, layers: int) -> str:
    residual = _patches(writer, config)  # [1, 1 + P, D_v]
    residual = _norm(writer, config, residual, "vision_tower.pre_layrnorm")
    normed = residual if layers == 0 else _norm(writer, config, residual, f"{LAYERS}.0.layer_norm1")
    for layer in range(layers):
        block = f"{LAYERS}.{layer}"
        attended = _attention(writer, config, block, normed)
        normed, residual = _add_and_norm(
            writer, config, residual, attended, f"{block}.self_attn.out_proj.bias", f"{block}.layer_norm2"
        )
        update = _mlp(writer, config, block, normed)
        if layer + 1 < layers:
            normed, residual = _add_and_norm(
                writer, config, residual, update, f"{block}.mlp.fc2.bias", f"{LAYERS}.{layer + 1}.layer_norm1"
            )
        else:
            biased = writer.op("Add", [update, writer.vector(f"{block}.mlp.fc2.bias")])
            residual = writer.op("Add", [residual, biased])
    bounds = [writer.constant(name, np.array([value])) for name, value in AFTER_CLASS_TOKEN.items()]
    return writer.op("Slice", [residual, *bounds])  # [1, P, D_v]


AFTER_CLASS_TOKEN = {"first_patch": 1, "end": np.iinfo(np.int64).max, "sequence_axis": 1}


def _patches(writer: ModelWriter, config: CLIPVisionConfig) -> str:
    name = "vision_tower.embeddings.patch_embedding.weight"
    patch, width = config.patch_size, config.hidden_size
    kernel = writer.float_tensor([name], writer.storage(name))
    plane = writer.op(
        "Conv", ["pixel_values", kernel], kernel_shape=[patch, patch], strides=[patch, patch]
    )  # [1, D_v, g, g]
    columns = writer.op("Reshape", [plane, writer.constant("patch_shape", np.array([1, width, -1]))])  # [1, D_v, P]
    rows = writer.op("Transpose", [columns], perm=[0, 2, 1])  # [1, P, D_v]
    class_token = writer.constant("class_token", writer.weight("vision_tower.embeddings.class_embedding")[None, None])
    tokens = writer.op("Concat", [class_token, rows], axis=1)  # [1, 1 + P, D_v]
    return writer.op("Add", [tokens, writer.vector("vision_tower.embeddings.position_embedding.weight")])


def _norm(writer: ModelWriter, config: CLIPVisionConfig, x: str, name: str) -> str:
    inputs = [x, writer.vector(f"{name}.weight"), writer.vector(f"{name}.bias")]
    return writer.op("LayerNormalization", inputs, axis=-1, epsilon=config.layer_norm_eps)


def _add_and_norm(
    writer: ModelWriter, config: CLIPVisionConfig, residual: str, update: str, bias: str, norm: str
) -> tuple[str, str]:
    """Add ``update`` and its bias to the residual stream -> (its layer norm, the new residual stream)."""
    normed, _, _, total = writer.node(
        "SkipLayerNormalization",
        [residual, update, writer.vector(f"{norm}.weight"), writer.vector(f"{norm}.bias"), writer.vector(bias)],
        [f"{norm}_normed", "", "", f"{norm}_residual"],
        MICROSOFT,
        epsilon=config.layer_norm_eps,
    )
    return normed, total


def _attention(writer: ModelWriter, config: CLIPVisionConfig, block: str, normed: str) -> str:
    """Self-attention without out_proj's bias, which the following norm adds."""
    names = [f"{block}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    qkv = token_linear(writer, normed, [f"{name}.weight" for name in names])  # [1, S, 3 * D_v]
    parts = writer.node("Split", [qkv], 3, axis=-1, num_outputs=3)
    bias = writer.constant(f"{block}.qkv_bias", np.concatenate([writer.weight(f"{name}.bias") for name in names]))
    heads = config.num_attention_heads
    attended = writer.op("MultiHeadAttention", [*parts, bias], None, MICROSOFT, num_heads=heads)  # [1, S, D_v]
    return token_linear(writer, attended, [f"{block}.self_attn.out_proj.weight"])


def _mlp(writer: ModelWriter, config: CLIPVisionConfig, block: str, normed: str) -> str:
    """The two linears without fc2's bias, which the following norm adds."""
    hidden = token_linear(writer, normed, [f"{block}.mlp.fc1.weight"], bias=writer.vector(f"{block}.mlp.fc1.bias"))
    activation, attributes = ACTIVATIONS[config.hidden_act]
    return token_linear(
        writer, writer.op(activation, [hidden], None, MICROSOFT, **attributes), [f"{block}.mlp.fc2.weight"]
    )


def _projector(writer: ModelWriter, features: str, grid: int, hidden: int) -> str:
    first = token_linear(writer, features, ["projector.linear_1.weight"], bias=writer.vector("projector.linear_1.bias"))
    activated = writer.op("Gelu", [first], None, MICROSOFT)
    second = token_linear(
        writer, activated, ["projector.linear_2.weight"], bias=writer.vector("projector.linear_2.bias")
    )
    columns = writer.op("Transpose", [second], perm=[0, 2, 1])  # [1, D, P]
    plane = writer.op("Reshape", [columns, writer.constant("plane_shape", np.array([1, hidden, grid, grid]))])
    # AdaptiveAvgPool2d(g // 2) of an even grid is a 2x2 window, of an odd grid 3x3, both at stride 2
    window = 2 + grid % 2
    pooled = writer.op("AveragePool", [plane], kernel_shape=[window, window], strides=[2, 2])  # [1, D, g/2, g/2]
    name = "projector.position.weight"
    kernel = writer.float_tensor([name], writer.storage(name))
    inputs = [pooled, kernel, writer.vector("projector.position.bias")]
    position = writer.op("Conv", inputs, kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=hidden)
    total = writer.op("Add", [pooled, position])
    flat = writer.op("Reshape", [total, writer.constant("token_shape", np.array([1, hidden, -1]))])  # [1, D, N]
    return writer.op("Transpose", [flat], "image_features", perm=[0, 2, 1])  # [1, N, D]
