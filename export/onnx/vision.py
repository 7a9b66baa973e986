"""Tower (CLIP, SigLIP) to the selected layers, and projector -> vision_encoder: pixel_values to image_features."""

from __future__ import annotations

import numpy as np

from bundle.manifest import Graph, Tensor
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.parts import CLIP, VisionConfig
from distill.models.projector import LDP_V2, mlp_depth
from export.onnx.activation import activation
from export.onnx.linear import FLOAT, ModelWriter
from export.onnx.token_linear import token_linear
from export.onnx.writer import MICROSOFT

LAYERS = "vision_tower.encoder.layers"
AFTER_FIRST = {"second_position": 1, "end": np.iinfo(np.int64).max, "sequence_axis": 1}


def write_vision_encoder(writer: ModelWriter, vlm: MobileVlm, path: str) -> Graph:
    """Write the graph of ``vlm.encode_images`` for one image."""
    size, tokens, hidden = (
        vlm.config.vision_config.image_size,
        vlm.config.visual_tokens,
        vlm.config.text_config.hidden_size,
    )
    assert isinstance(size, int)
    writer.input("pixel_values", FLOAT, [1, 3, size, size])
    writer.output("image_features", FLOAT, [1, tokens, hidden])
    features = _tower(writer, vlm.config)  # [1, P, D_v]
    if vlm.config.projector_type == LDP_V2:
        _pooled_projector(writer, features, vlm.config.patch_grid, hidden)
    else:
        _linear_projector(writer, features, vlm.config)
    writer.save()
    return Graph(
        path=path,
        inputs=(Tensor(name="pixel_values", dtype="float32", shape=(1, 3, size, size)),),
        outputs=(Tensor(name="image_features", dtype="float32", shape=(1, tokens, hidden)),),
    )


def _tower(writer: ModelWriter, whole: MobileVlmConfig) -> str:
    """The features of ``distill.models.mobilevlm.selected_features``."""
    config, layers = whole.vision_config, whole.tower_layers
    residual = _patches(writer, config)  # [1, S, D_v]; S = 1 + P of CLIP, P of SigLIP
    read = {0: residual}
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
        read[layer + 1] = residual
    states = [read[number] for number in whole.tower_states]
    features = states[0] if len(states) == 1 else writer.op("Concat", states, axis=2)  # [1, S, D_v * states]
    if whole.vision_select_strategy != "default":
        return features
    bounds = [writer.constant(name, np.array([value])) for name, value in AFTER_FIRST.items()]
    return writer.op("Slice", [features, *bounds])  # [1, P, D_v * states]


def _patches(writer: ModelWriter, config: VisionConfig) -> str:
    embeddings = "vision_tower.embeddings"
    name, patch, width = f"{embeddings}.patch_embedding", config.patch_size, config.hidden_size
    kernel, bias = writer.float_tensor([f"{name}.weight"], writer.storage(f"{name}.weight")), writer.bias_of([name])
    inputs = ["pixel_values", kernel] + ([] if bias is None else [bias])  # CLIP has none
    plane = writer.op("Conv", inputs, kernel_shape=[patch, patch], strides=[patch, patch])  # [1, D_v, g, g]
    columns = writer.op("Reshape", [plane, writer.constant("patch_shape", np.array([1, width, -1]))])  # [1, D_v, P]
    tokens = writer.op("Transpose", [columns], perm=[0, 2, 1])  # [1, P, D_v]
    has_class_token = config.model_type == CLIP
    if has_class_token:
        first = writer.constant("class_token", writer.weight(f"{embeddings}.class_embedding")[None, None])
        tokens = writer.op("Concat", [first, tokens], axis=1)  # [1, 1 + P, D_v]
    placed = writer.op("Add", [tokens, writer.vector(f"{embeddings}.position_embedding.weight")])
    return _norm(writer, config, placed, "vision_tower.pre_layrnorm") if has_class_token else placed


def _norm(writer: ModelWriter, config: VisionConfig, x: str, name: str) -> str:
    inputs = [x, writer.vector(f"{name}.weight"), writer.vector(f"{name}.bias")]
    return writer.op("LayerNormalization", inputs, axis=-1, epsilon=config.layer_norm_eps)


def _add_and_norm(
    writer: ModelWriter, config: VisionConfig, residual: str, update: str, bias: str, norm: str
) -> tuple[str, str]:
    """Add ``update`` and its bias to the residual stream -> (its layer norm, the new residual stream).

    Not SkipLayerNormalization, which does it all at once: 3.0 ms on [577, 1024] against 1.1 for these three
    (onnxruntime 1.32, one AVX-512 thread of a busy machine, CPU time).
    """
    total = writer.op("Add", [residual, writer.op("Add", [update, writer.vector(bias)])])
    return _norm(writer, config, total, norm), total


def _attention(writer: ModelWriter, config: VisionConfig, block: str, normed: str) -> str:
    """Self-attention without out_proj's bias, which the following norm adds."""
    names = [f"{block}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    qkv = token_linear(writer, normed, [f"{name}.weight" for name in names])  # [1, S, 3 * D_v]
    parts = writer.node("Split", [qkv], 3, axis=-1, num_outputs=3)
    bias = writer.constant(f"{block}.qkv_bias", np.concatenate([writer.weight(f"{name}.bias") for name in names]))
    heads = config.num_attention_heads
    attended = writer.op("MultiHeadAttention", [*parts, bias], None, MICROSOFT, num_heads=heads)  # [1, S, D_v]
    return token_linear(writer, attended, [f"{block}.self_attn.out_proj.weight"])


def _mlp(writer: ModelWriter, config: VisionConfig, block: str, normed: str) -> str:
    """The two linears without fc2's bias, which the following norm adds."""
    hidden = token_linear(writer, normed, [f"{block}.mlp.fc1.weight"], bias=writer.vector(f"{block}.mlp.fc1.bias"))
    return token_linear(writer, activation(writer, config.hidden_act, hidden), [f"{block}.mlp.fc2.weight"])


def _linear_projector(writer: ModelWriter, features: str, config: MobileVlmConfig) -> None:
    """LLaVA's: linear layers with an activation between them, on every patch by itself."""
    depth = mlp_depth(config.projector_type)
    for number in range(depth):
        layer = f"projector.linears.{number}"
        output = "image_features" if number + 1 == depth else None
        features = token_linear(writer, features, [f"{layer}.weight"], writer.bias_of([layer]), output)  # [1, P, D]
        if output is None:
            features = activation(writer, config.projector_activation, features)


def _pooled_projector(writer: ModelWriter, features: str, grid: int, hidden: int) -> None:
    """LDPv2."""
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
    writer.op("Transpose", [flat], "image_features", perm=[0, 2, 1])  # [1, N, D]
