"""alignkd's Align-KD training step against the published formulation: same weights, same batch, alternating.

    OMP_NUM_THREADS=2 python benchmarks/distill_step.py

Prints a Markdown table: seconds of a step (forward, losses, backward; no optimizer), and the peak of resident memory
above the loaded models, each measured in a fresh fork of the process. ``features`` is our step with the shared tower's
features known beforehand, as alignkd-distill does when they fit into memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from published_step import TOP_K, published_loss
from transformers import CLIPVisionConfig, LlamaConfig

from distill.align_kd import AlignKD, TermSettings
from distill.config import PRESETS
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from runtime_bench.device import local_device
from runtime_bench.memory import read_memory

VOCABULARY, BEFORE_IMAGE, QUESTION, ANSWER = 32_000, 36, 34, 86  # with 144 visual tokens: L = 300, 86 supervised
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    """Sizes of a LLaMA decoder."""

    width: int
    layers: int
    heads: int
    intermediate: int


SHAPES = {  # name -> teacher, student, (tower's width, layers, heads)
    "small": (Decoder(1024, 10, 16, 2816), Decoder(512, 8, 8, 1408), (384, 12, 6)),
    "1.7B": (Decoder(4096, 32, 32, 11008), Decoder(2048, 24, 16, 5632), (1024, 24, 16)),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write every sample there")
    flags = parser.parse_args()
    torch.manual_seed(0)
    module, batch = make_module(flags.shape), make_batch(flags.batch)
    steps = make_steps(module, batch)
    memory = {name: peak_above(module, step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(flags.repeats + 1):  # the first round warms up
        for name, step in steps.items():
            begun = time.perf_counter()
            step().backward()
            if number:
                seconds[name].append(time.perf_counter() - begun)
            module.zero_grad(set_to_none=True)
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": local_device().cpu,
        "shape": flags.shape,
    }
    conditions |= {"batch": flags.batch, "positions": 144 + BEFORE_IMAGE + QUESTION + ANSWER, "repeats": flags.repeats}
    sys.stdout.write(table(seconds, memory) + "\n\n" + ", ".join(f"{k} {v}" for k, v in conditions.items()) + "\n")
    if flags.json is not None:
        facts = {"conditions": conditions, "seconds": seconds, "peak_bytes_above_models": memory}
        flags.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def make_module(shape: str) -> AlignKD:
    """Random models of these sizes with one tower between them."""
    teacher_size, student_size, (width, layers, heads) = SHAPES[shape]
    vision = CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=336,
        patch_size=14,
    )
    teacher, student = (
        MobileVlm(
            MobileVlmConfig(
                LlamaConfig(
                    hidden_size=size.width,
                    num_hidden_layers=size.layers,
                    num_attention_heads=size.heads,
                    num_key_value_heads=size.heads,
                    intermediate_size=size.intermediate,
                    vocab_size=VOCABULARY,
                    max_position_embeddings=2048,
                ),
                vision,
            )
        )
        for size in (teacher_size, student_size)
    )
    student.vision_tower.load_state_dict(teacher.vision_tower.state_dict())
    return AlignKD(student, teacher, PRESETS["paper"], TermSettings(top_k=TOP_K))


def make_batch(size: int) -> dict[str, torch.Tensor]:
    """Random conversations in the order of the v1 template: system text, image, question, answer."""
    ids = torch.randint(3, VOCABULARY, (size, BEFORE_IMAGE + 1 + QUESTION + ANSWER))
    ids[:, BEFORE_IMAGE] = MobileVlmConfig().image_token_id
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(size, 3, 336, 336),
    }


def make_steps(module: AlignKD, batch: dict[str, torch.Tensor]) -> dict[str, Step]:
    """Name -> a function that returns the loss of one step."""
    with torch.no_grad():
        features = module.student.tower_features(batch["pixel_values"])
    known = {name: value for name, value in batch.items() if name != "pixel_values"} | {"image_features": features}
    return {
        "published": lambda: published_loss(module, batch),
        "alignkd": lambda: module.total(module(**batch)),
        "alignkd, features known": lambda: module.total(module(**known)),
    }


def peak_above(module: AlignKD, step: Step) -> int:
    """Peak resident bytes of one step, its gradients included, above those of the process with both models loaded."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_peak_in_child, args=(theirs, module, step))
    child.start()
    theirs.close()
    peak = int(ours.recv())
    child.join()
    return peak


def _peak_in_child(pipe: Connection, module: AlignKD, step: Step) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive a fork
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now what is resident
    before = read_memory().peak_bytes
    step().backward()
    pipe.send(read_memory().peak_bytes - before)
    pipe.close()
    os._exit(0)


def table(seconds: dict[str, list[float]], memory: dict[str, int]) -> str:
    """Markdown: median seconds and peak memory, each with the ratio to the published formulation."""
    lines = ["| step | s | faster | MiB above the models | share |", "|---|---|---|---|---|"]
    base, base_memory = statistics.median(seconds["published"]), memory["published"]
    for name, samples in seconds.items():
        median = statistics.median(samples)
        lines.append(
            f"| {name} | {median:.2f} | {base / median:.2f}x | {memory[name] / 2**20:.0f} | "
            f"{memory[name] / base_memory:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
