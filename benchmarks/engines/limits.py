"""This machine and the model's sizes -> how fast any engine could be: read bandwidth, int8 rate, what they allow."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.peers import HERE

BITS_PER_WEIGHT = 4.5  # int4 with a half-precision scale per 32


@dataclass(frozen=True)
class Limit:
    """What the machine gives with some threads.

    Attributes:
        int8_tops: 1e12 operations per second, multiplications and additions counted apart.
    """

    threads: int
    read_gb_per_s: float
    int8_tops: float


@dataclass(frozen=True)
class Arithmetic:
    """What the model asks for.

    Attributes:
        decoder_weights: that one token multiplies with: all but the embedding table.
        vision_operations: of one picture, tower and projector.
        attention_per_row: operations of one prompt row per row before it.
        cache_bytes_per_row: keys and values of one row at float16.
    """

    decoder_weights: int
    vision_operations: float
    attention_per_row: int
    cache_bytes_per_row: int

    def limits(self, limit: Limit, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Vision seconds, prefill and decode tokens per second that no engine at int8 and 4.5 bits can beat."""
        row = 2 * self.decoder_weights + self.attention_per_row * prompt_tokens / 2
        step_bytes = self.decoder_weights * BITS_PER_WEIGHT / 8
        step_bytes += self.cache_bytes_per_row * (prompt_tokens + new_tokens / 2)
        return {
            "vision_s": self.vision_operations / (limit.int8_tops * 1e12),
            "prefill": limit.int8_tops * 1e12 / row,
            "decode": limit.read_gb_per_s * 1e9 / step_bytes,
        }


def measure_limit(threads: int, folder: Path) -> Limit | str:
    """Compile and run limits.c, or one line why not."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "machine limits not measured: no C compiler"
    program = folder / "limits"
    command = [compiler, "-O3", "-march=native", "-pthread", str(HERE / "limits.c"), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode != 0:
        return f"machine limits not measured: {compiled.stderr.strip().splitlines()[-1]}"
    done = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True)
    return Limit(**json.loads(done.stdout))


def arithmetic(checkpoint: Path) -> Arithmetic:
    """From the checkpoint's two configs."""
    text: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tower_file = next(checkpoint.glob("*/preprocessor_config.json")).with_name("config.json")
    tower: dict[str, Any] = json.loads(tower_file.read_text(encoding="utf-8"))
    tower = tower.get("vision_config", tower)
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    cache = 2 * hidden * text["num_key_value_heads"] // text["num_attention_heads"]
    layer = 2 * hidden**2 + hidden * cache + 3 * hidden * text["intermediate_size"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    width, rows = tower["hidden_size"], patches + 1
    block = 2 * rows * (4 * width**2 + 2 * width * tower["intermediate_size"]) + 4 * rows**2 * width
    projector = 2 * patches * (width * hidden + hidden**2)
    return Arithmetic(
        decoder_weights=layers * layer + hidden * text["vocab_size"],
        vision_operations=float((tower["num_hidden_layers"] - 1) * block + projector),
        attention_per_row=4 * layers * hidden,
        cache_bytes_per_row=2 * layers * cache,
    )
