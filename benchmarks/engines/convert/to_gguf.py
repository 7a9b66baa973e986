"""LLaMA folder and MobileVLM checkpoint -> GGUF files by the gguf package; Q4_0 by llama.cpp's own quantizer.

    python to_gguf.py LLAMA CHECKPOINT OUTPUT      in llama.cpp's environment

Writes model-q4_0.gguf and mmproj-f16.gguf. The tower stays float16: llama.cpp encodes slower from 8-bit weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOWER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "vision_model.embeddings.class_embedding": "v.class_embd",
    "vision_model.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "vision_model.embeddings.position_embedding.weight": "v.position_embd.weight",
    "vision_model.pre_layrnorm.weight": "v.pre_ln.weight",
    "vision_model.pre_layrnorm.bias": "v.pre_ln.bias",
    "model.mm_projector.mlp.mlp.0.weight": "mm.model.mlp.0.weight",
    "model.mm_projector.mlp.mlp.0.bias": "mm.model.mlp.0.bias",
    "model.mm_projector.mlp.mlp.2.weight": "mm.model.mlp.2.weight",
    "model.mm_projector.mlp.mlp.2.bias": "mm.model.mlp.2.bias",
    "model.mm_projector.peg.peg.0.weight": "mm.model.peg.0.weight",
    "model.mm_projector.peg.peg.0.bias": "mm.model.peg.0.bias",
}


def write_text(llama: Path, path: Path) -> None:
    """The decoder at float16."""
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, llama / "tokenizer.model")

    def value(name: str, weight: np.ndarray) -> np.ndarray:
        if "q_proj" in name or "k_proj" in name:  # rotary pairs lie side by side in GGUF
            count = heads if "q_proj" in name else kv_heads
            halves = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        return weight.astype(np.float32 if weight.ndim == 1 else np.float16)

    _write(writer, _weights(llama), lambda name: _text_name(name), value)


def write_vision(checkpoint: Path, path: Path) -> None:
    """Tower and LDPv2 projector; matrices at float16."""
    tower_folder = next(checkpoint.glob("*/preprocessor_config.json")).parent
    tower = json.loads((tower_folder / "config.json").read_text(encoding="utf-8"))
    tower = tower.get("vision_config", tower)
    image = json.loads((tower_folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    text = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    layers = tower["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "ldpv2")
    writer.add_uint32("clip.vision.image_size", tower["image_size"])
    writer.add_uint32("clip.vision.patch_size", tower["patch_size"])
    writer.add_uint32("clip.vision.embedding_length", tower["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", tower["intermediate_size"])
    writer.add_uint32("clip.vision.projection_dim", text["hidden_size"])
    writer.add_uint32("clip.vision.attention.head_count", tower["num_attention_heads"])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", tower.get("layer_norm_eps", 1e-5))
    writer.add_uint32("clip.vision.block_count", layers)  # it runs all but the last, as MobileVLM does
    writer.add_array("clip.vision.image_mean", image["image_mean"])
    writer.add_array("clip.vision.image_std", image["image_std"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    def value(name: str, weight: np.ndarray) -> np.ndarray:
        small = weight.ndim == 1 or "position_embedding" in name
        return weight.astype(np.float32 if small else np.float16)

    def weights() -> Iterator[tuple[str, np.ndarray]]:
        yield from _weights(tower_folder)
        yield from ((n, w) for n, w in _weights(checkpoint) if n.startswith("model.mm_projector."))

    _write(writer, weights(), lambda name: _tower_name(name, layers), value)


def quantize(source: Path, path: Path) -> None:
    """Q4_0 by llama.cpp itself; its default keeps the head at Q6_K."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 2
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters)
    assert failed == 0, failed


def _text_name(name: str) -> str | None:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def _tower_name(name: str, layers: int) -> str | None:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    if "encoder.layers." not in name:
        return None
    layer, rest = name.split("encoder.layers.")[1].split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"v.blk.{layer}.{TOWER_NAMES[part]}.{kind}" if int(layer) < layers else None


def _weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _write(
    writer: gguf.GGUFWriter,
    weights: Iterator[tuple[str, np.ndarray]],
    renamed: Callable[[str], str | None],
    value: Callable[[str, np.ndarray], np.ndarray],
) -> None:
    for name, weight in weights:
        new = renamed(name)
        if new is not None:
            writer.add_tensor(new, value(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    model: Any = SentencePieceProcessor(model_file=str(path))
    tokens, scores, kinds = [], [], []
    for at in range(model.vocab_size()):
        tokens.append(model.id_to_piece(at).encode())
        scores.append(model.get_score(at))
        kind = gguf.TokenType.NORMAL
        if model.is_unknown(at):
            kind = gguf.TokenType.UNKNOWN
        elif model.is_control(at):
            kind = gguf.TokenType.CONTROL
        elif model.is_byte(at):
            kind = gguf.TokenType.BYTE
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())


def main(llama: Path, checkpoint: Path, output: Path) -> None:
    """Write both files; the float16 decoder goes once it is quantized."""
    output.mkdir(parents=True)
    whole = output / "model-f16.gguf"
    write_text(llama, whole)
    quantize(whole, output / "model-q4_0.gguf")
    whole.unlink()
    write_vision(checkpoint, output / "mmproj-f16.gguf")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
