"""A MobileVLM checkpoint as published -> its LLaMA alone as a Hugging Face folder, which the peers' own tools convert.

python llama_folder.py CHECKPOINT OUTPUT      in alignkd's environment
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from export.onnx.genai import write_tokenizer

OTHER_PARTS = ("model.mm_projector.", "model.vision_tower.")
KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "torch_dtype",
)


def write_llama(checkpoint: Path, output: Path) -> None:
    """Copy the decoder's weights, its config and the tokenizer."""
    output.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | {name: config[name] for name in KEPT}
    (output / "config.json").write_text(json.dumps(llama, indent=1), encoding="utf-8")
    weights: dict[str, np.ndarray] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if not name.startswith(OTHER_PARTS)}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(checkpoint / "tokenizer.model", output)
    (output / "tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())


if __name__ == "__main__":
    write_llama(Path(sys.argv[1]), Path(sys.argv[2]))
