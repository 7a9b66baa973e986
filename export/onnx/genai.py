"""Written ONNX graphs -> what makes the bundle a folder that stock onnxruntime-genai opens: no weight is stored twice.

``Model(bundle)`` runs with pixels and ids handed over by ``Generator.set_inputs`` and ``append_tokens``: the model type
"gemma3" is its plain image-text pipeline (vision graph, embedding graph, decoder) and asks for no image processor. The
ids hold the image id of the manifest's tokenizer once per visual token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bundle.manifest import Graph, GraphName, ModelShape
from bundle.staging import write_text_whole
from export.contract import ExportRequest
from export.model.hf_tokenizer import write_tokenizer
from export.model.shape import model_shape

CARRIER = "gemma3"
CONFIG_FILE = "genai_config.json"


def write_genai(request: ExportRequest, graphs: dict[GraphName, Graph]) -> None:
    """Write genai_config.json, tokenizer.json and an embedding graph that puts the visual tokens in their places."""
    embedding = graphs["token_embedding"].path.replace("embed_tokens", "embed_tokens_genai")
    shape = model_shape(request.vlm, request.context_length)
    write_embedding_with_image(
        request.output / graphs["token_embedding"].path,
        request.output / embedding,
        request.vlm.image_token_id,
        shape.hidden_size,
    )
    write_tokenizer(request.tokenizer_path, request.output)
    config = genai_config(request, shape, graphs, embedding)
    write_text_whole(request.output / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def write_embedding_with_image(plain: Path, path: Path, image_id: int, hidden: int) -> None:
    """Graph of input_ids -> the same with image_features scattered to the image ids; it reads the same data file.

    Args:
        plain: the written token embedding; ``path`` lies beside it, as external data must.
        hidden: D; image_features may be [N, D], [1, N, D] or empty.
    """
    model = onnx.load(plain, load_external_data=False)
    graph = model.graph
    # a text-only prompt comes with features of another rank than an image's: no shape is declared
    graph.input.append(helper.make_tensor_value_info("image_features", TensorProto.FLOAT, None))
    for name, value in (("image_id", [image_id]), ("first_id", [0]), ("feature_rows", [-1, hidden])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    lookup = list(graph.node)
    for node in lookup:
        node.input[:] = ["text_ids" if name == "input_ids" else name for name in node.input]
        node.output[:] = ["text_rows" if name == "inputs_embeds" else name for name in node.output]
    before = [helper.make_node("Max", ["input_ids", "first_id"], ["text_ids"])]  # the image id is no row of the table
    after = [
        helper.make_node("Equal", ["input_ids", "image_id"], ["is_image"]),  # [1, T]
        helper.make_node("NonZero", ["is_image"], ["image_axes"]),  # [2, N]
        helper.make_node("Transpose", ["image_axes"], ["image_places"], perm=[1, 0]),  # [N, 2]
        helper.make_node("Reshape", ["image_features", "feature_rows"], ["features"]),  # [N, D]
        helper.make_node("ScatterND", ["text_rows", "image_places", "features"], ["inputs_embeds"]),  # [1, T, D]
    ]
    del graph.node[:]
    graph.node.extend([*before, *lookup, *after])
    path.write_bytes(model.SerializeToString(deterministic=True))


def genai_config(
    request: ExportRequest, shape: ModelShape, graphs: dict[GraphName, Graph], embedding: str
) -> dict[str, Any]:
    """The content of genai_config.json."""
    return {
        "model": {
            "type": CARRIER,
            **({} if request.bos_id is None else {"bos_token_id": request.bos_id}),
            "eos_token_id": list(request.eos_ids),
            "pad_token_id": request.eos_ids[0],
            "image_token_id": request.vlm.image_token_id,
            "context_length": shape.context_length,
            "vocab_size": shape.vocab_size,
            "vision": {
                "filename": graphs["vision_encoder"].path,
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": "image_features"},
            },
            "embedding": {
                "filename": embedding,
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": graphs["text_decoder"].path,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.num_heads,
                "num_hidden_layers": shape.num_layers,
                "num_key_value_heads": shape.num_kv_heads,
                "inputs": {
                    "inputs_embeds": "inputs_embeds",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": shape.context_length, "do_sample": False, "past_present_share_buffer": True},
    }
