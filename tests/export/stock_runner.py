"""ExecuTorch's own multimodal runner on a .pte, in a process of its own: it has a second XNNPACK, and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor

PROGRAM = """
import json, sys
import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized
import torch
from executorch.extension.llm.runner import GenerationConfig, MultimodalRunner, make_image_input, make_token_input
from safetensors.torch import load_file
pte, tokenizer, image, before, after, new_tokens = sys.argv[1:]
runner, pieces = MultimodalRunner(pte, tokenizer), []
pixels = make_image_input(load_file(image)["pixels"])
inputs = [make_token_input(json.loads(before)), pixels, make_token_input(json.loads(after))]
config = GenerationConfig(max_new_tokens=int(new_tokens), temperature=0.0, echo=False, num_bos=0)
runner.generate(inputs, config, token_callback=pieces.append)
print()
print(json.dumps(pieces))
"""


def stock_answer(
    pte: Path, tokenizer: Path, pixels: torch.Tensor, before: list[int], after: list[int], new_tokens: int, folder: Path
) -> list[str]:
    """Ids before an image, the image [1, 3, S, S], ids behind it -> the pieces that the runner answers with."""
    image = folder / "image.safetensors"
    save_file({"pixels": pixels.contiguous()}, image)
    arguments = [pte, tokenizer, image, json.dumps(before), json.dumps(after), new_tokens]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, errors="replace"
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def pieces_of(tokenizer: Path, ids: list[int]) -> list[str]:
    """What the runner should print for these ids."""
    processor = SentencePieceProcessor(model_file=str(tokenizer))
    return [processor.id_to_piece(i).replace("\u2581", " ") for i in ids]
