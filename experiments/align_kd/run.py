"""Arms x seeds -> results/ARM.SCENES.SEED.json: the student trained by alignkd-distill's own code, and its accuracy.

    python experiments/align_kd/run.py --arms "ce;paper;ours" --seeds 2,3,4,5,6

One thread; a result that lies there is not made again, so several processes may share the work by --seeds. A seed
chooses the training set, the order of its rows and the adapters' start: all arms share these, and the start student.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm
from families import mean_accuracy
from rich.console import Console

from bundle.staging import write_text_whole
from bundle.tokenizer import open_tokenizer
from distill.demo_world.demo_benchmarks import held_out_rows, training_rows
from distill.evaluation.family_accuracy import family_accuracy
from distill.models import load_vlm
from distill.models.processing import read_processing
from distill.settings.recording import CacheConfig, CacheStorage
from distill.settings.training import DistillConfig
from distill.teacher_cache.record import record
from distill.training.run import train

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = ROOT / "distill" / "demo_teacher", ROOT / "distill" / "demo_student"
SPLITS = {"validation": "test", "test": "test", "unseen": "unseen_pairs"}  # split -> kind of scenes
TOP_K = 3  # of the demo's 9 visual tokens, as 16 of 144 would round to 1
PLACES = ("student", "teacher", "data", "output", "cache")  # settings that say where files lay, not what was run
WORDS = 768  # all of the demo's vocabulary: the recorded teacher is the live one but for rounding to float16


def make_data(folder: Path, training_set: int, scenes: int, per_family: int) -> Path:
    """Training set ``training_set`` and, once, the three held-out splits; returns the training file."""
    for split, kind in SPLITS.items():
        if not (folder / split / "rows.json").is_file():
            rows = held_out_rows(folder / split, kind, random.Random(f"evidence {split}"), per_family)
            write_text_whole(folder / split / "rows.json", json.dumps(rows) + "\n")
    home = folder / f"train{training_set}-{scenes}"
    if not (home / "train.json").is_file():
        rows = training_rows(home, random.Random(f"evidence train {training_set}"), scenes)
        write_text_whole(home / "train.json", json.dumps(rows) + "\n")
    return home / "train.json"


def run(arm: Arm, seed: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Train one student and ask it."""
    data = make_data(flags.data, seed % flags.training_sets, flags.scenes, flags.per_family)
    steps, output = round(flags.steps * arm.steps), flags.data / f"student-{os.getpid()}"
    config = DistillConfig(
        student=STUDENT,
        teacher=TEACHER,
        data=data,
        output=output,
        max_steps=steps,
        seed=seed,
        top_k=TOP_K,
        batch_size=flags.batch,
        learning_rate=flags.lr,
        grad_norm_steps=max(1, (steps - 1) // 2),  # at the start, in the middle and at the end
        log_steps=max(1, steps // 20),
        save_steps=steps,
        report="none",
    )
    config = replace(config, **arm.settings)
    if config.needs_teacher and not config.shuffled_teacher and config.losses != "published_code":
        cache = flags.data / f"cache{seed % flags.training_sets}-{flags.scenes}-{os.getpid()}"
        config = replace(config, cache=recorded(config, cache))
    begun = time.monotonic()
    train(config, Console(quiet=True))
    seconds = time.monotonic() - begun
    log = json.loads((output / "training_log.json").read_text(encoding="utf-8"))
    vlm, processing = load_vlm(output), read_processing(output)
    tokenizer = open_tokenizer(processing.tokenizer, output)
    accuracy = {
        split: family_accuracy(vlm, processing, tokenizer, flags.data / split / "rows.json") for split in SPLITS
    }
    shutil.rmtree(output)
    return {
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "settings": {name: value for name, value in log["settings"].items() if name not in PLACES},
        "accuracy": accuracy,
        "gradient_norms": entries(log["log"], "gradient_norm/"),
        "terms": entries(log["log"], "term/"),
    }


def recorded(config: DistillConfig, folder: Path) -> Path:
    """A cache with what the teacher says to this training set, so that arms and passes share its one look."""
    asked = {name: getattr(config, name) for name in ("losses", "weights", "temperature", "mask", "top_k", "data")}
    storage = CacheStorage(words=WORDS)
    record(CacheConfig(folder, TEACHER, student=STUDENT, storage=storage, **asked), Console(quiet=True))
    return folder


def entries(log: list[dict[str, float]], prefix: str) -> list[dict[str, float]]:
    """The log's entries with names of this prefix, and their steps."""
    chosen = [entry for entry in log if any(name.startswith(prefix) for name in entry)]
    return [{k: v for k, v in entry.items() if k.startswith(prefix)} | {"step": entry["step"]} for entry in chosen]


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=";".join(ARMS), help="names, separated by semicolons")
    parser.add_argument("--seeds", default="2,3,4,5,6")
    parser.add_argument("--scenes", type=int, default=600, help="training conversations")
    parser.add_argument("--per-family", type=int, default=100, help="held-out questions of each family and split")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--training-sets", type=int, default=20, help="seeds share a set beyond this number")
    parser.add_argument("--data", type=Path, default=Path("evidence_data"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    flags = parser.parse_args()
    arms = flags.arms.split(";")
    if unknown := [name for name in arms if name not in ARMS]:
        parser.error(f"no arm {unknown[0]!r}; there are: {'; '.join(ARMS)}")
    torch.set_num_threads(1)
    flags.output.mkdir(parents=True, exist_ok=True)
    for seed in (int(seed) for seed in flags.seeds.split(",")):
        for name in arms:
            path = flags.output / f"{name.replace(', ', '_').replace(' ', '-')}.{flags.scenes}.{seed}.json"
            if path.is_file():
                continue
            result = {"arm": name} | run(ARMS[name], seed, flags)
            write_text_whole(path, json.dumps(result) + "\n")
            found = {split: round(mean_accuracy(families), 1) for split, families in result["accuracy"].items()}
            sys.stderr.write(f"{name}, seed {seed}: {found}, {result['seconds']:.0f} s\n")
    done = [path for path in flags.output.glob("*.json")]
    minutes = statistics.mean(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in done) / 60
    sys.stderr.write(f"{len(done)} results in {flags.output}, {minutes:.1f} minutes each; now: report.py\n")


if __name__ == "__main__":
    main()
