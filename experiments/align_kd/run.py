"""Arms x seeds -> results/ARM-SEED.json: the student trained by alignkd-distill's own code, and its accuracy."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm
from rich.console import Console

from bundle.tokenizer import Tokenizer, open_tokenizer
from distill.align_kd import AlignKD
from distill.config import DistillConfig
from distill.data import Collator, Example, ImageStore, LlavaDataset, encode_row
from distill.demo_benchmarks import held_out_rows, training_rows
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.recorded_teacher import DenseRows, record_teacher, together
from distill.rows import Row, parse_row
from distill.teacher_view import Wanted
from distill.trainer import train

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = ROOT / "distill" / "demo_teacher", ROOT / "distill" / "demo_student"
SPLITS = {"validation": "test", "test": "test", "unseen": "unseen_pairs"}  # split -> kind of scenes


def make_data(folder: Path, training_set: int, scenes: int, per_family: int) -> Path:
    """Training set ``training_set`` and, once, the three held-out splits."""
    for split, kind in SPLITS.items():
        home = folder / split
        if not (home / "rows.json").is_file():
            rows = held_out_rows(home, kind, random.Random(f"evidence {split}"), per_family)
            (home / "rows.json").write_text(json.dumps(rows))
    home = folder / f"train{training_set}-{scenes}"
    if not (home / "train.json").is_file():
        rows = training_rows(home, random.Random(f"evidence train {training_set}"), scenes)
        (home / "train.json").write_text(json.dumps(rows))
    return home / "train.json"


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, computed once and kept on disk."""
    if not path.is_file():
        part = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(make(), part)
        os.replace(part, path)
    return torch.load(path, weights_only=False)


@torch.no_grad()
def split_features(vlm: MobileVlm, rows: list[Row], store: ImageStore) -> dict[Path, torch.Tensor]:
    found = {}
    seen = [row for row in rows if row.image]
    for start in range(0, len(seen), 64):
        some = seen[start : start + 64]
        for row, features in zip(some, vlm.tower_features(torch.stack([store.decode(row) for row in some])), strict=True):
            found[row.image] = features
    return found


@torch.no_grad()
def accuracy(vlm: MobileVlm, processing: Processing, tokenizer: Tokenizer, home: Path) -> dict[str, float]:
    data = home / "rows.json"
    raws = json.loads(data.read_text())
    rows = [parse_row(raw, number, data, home) for number, raw in enumerate(raws)]
    store = ImageStore(processing.image, 0)
    features = kept(home / "features.pt", lambda: split_features(vlm, rows, store))
    collator = Collator(0, store, features)
    families: dict[str, list[Example]] = defaultdict(list)
    for raw, row in zip(raws, rows, strict=True):
        ids, labels = encode_row(row, processing, tokenizer)
        families[raw["family"]].append({"input_ids": ids, "labels": labels, "row": row})
    result = {}
    for family, examples in families.items():
        right = 0
        for start in range(0, len(examples), 100):
            batch = collator(examples[start : start + 100])
            has = bool((batch["input_ids"] == vlm.image_token_id).any())
            visual = vlm.projector(batch["image_features"]) if has else None
            expanded = vlm.expand(batch["input_ids"], batch["attention_mask"], visual, batch["labels"])
            likeliest = vlm.lm_head(vlm.hidden_states(expanded)).argmax(-1)
            wanted = expanded.labels[:, 1:]
            right += int(((likeliest[:, :-1] == wanted) | (wanted == -100)).all(1).sum())
        result[family] = 100 * right / len(examples)
    return result


EVERYTHING = {"cross_entropy": 1.0, "forward_kl": 1.0, "attention": 1.0, "attention_groups": 1.0, "visual": 1.0}


def recorded(config: DistillConfig, dataset: LlavaDataset, collator: Collator, shuffled: bool) -> list[Any]:
    """Everything that any term asks of the teacher, for every row."""
    source = collator
    if shuffled:
        paths = list(collator.features)
        turned = paths[1:] + paths[:1]
        source = Collator(collator.pad_id, collator.images, {a: collator.features[b] for a, b in zip(paths, turned)})
    module = AlignKD(load_vlm(config.student), load_vlm(config.teacher), EVERYTHING)
    return record_teacher(module, dataset, source)


def thinned(view: Any, wanted: Wanted) -> Any:
    return replace(
        view,
        rows=view.rows if wanted.rows else None,
        attention=view.attention if wanted.attention else None,
        groups=view.groups if wanted.groups else None,
        visual=view.visual if wanted.visual else None,
    )


def run(arm: Arm, seed: int, flags: argparse.Namespace, work: Path) -> dict[str, object]:
    data = make_data(flags.data, seed % flags.training_sets, flags.scenes, flags.per_family)
    steps = round(flags.steps * arm.steps)
    config = DistillConfig(
        student=STUDENT, teacher=TEACHER, data=data, output=work, max_steps=steps, seed=seed, top_k=3,
        batch_size=flags.batch, grad_norm_steps=max(1, (steps - 1) // 2), log_steps=max(1, steps // 20), save_steps=10**9, report="none",
    )
    config = replace(config, **({"learning_rate": flags.lr} | arm.settings))

    def prepare(module: AlignKD, dataset: LlavaDataset, collator: Collator) -> None:
        if module.teacher is None or config.losses == "published_code":
            return
        wanted = module.wanted
        name = f"teacher{'-shuffled' if arm.shuffled else ''}.pt"
        views = kept(data.parent / name, lambda: recorded(config, dataset, collator, arm.shuffled))
        views = [thinned(view, wanted) for view in views]
        temperature = config.temperature

        def view_of(examples: list[Example]) -> Any:
            view = together([views[example["row"].number] for example in examples])
            if temperature != 1 and view.rows is not None:
                view = replace(view, rows=DenseRows((view.rows.log_teacher.float() / temperature).log_softmax(-1)))
            return view

        collator.teacher_views = view_of

    begun = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(work.with_name(work.name + ".work"), ignore_errors=True)
    train(config, Console(quiet=True), prepare)
    seconds = time.monotonic() - begun
    log = json.loads((work / "training_log.json").read_text())
    vlm, processing = load_vlm(work), read_processing(work)
    tokenizer = open_tokenizer(processing.tokenizer, work)
    found = {split: accuracy(vlm, processing, tokenizer, flags.data / split) for split in SPLITS}
    norms = [{k: v for k, v in e.items() if k.startswith("gradient_norm/")} | {"step": e["step"]} for e in log["log"] if any(k.startswith("gradient_norm/") for k in e)]
    curve = [{k: v for k, v in e.items() if k.startswith("term/")} | {"step": e["step"]} for e in log["log"] if "loss" in e]
    shutil.rmtree(work)
    return {"seed": seed, "steps": steps, "seconds": seconds, "settings": log["settings"], "accuracy": found, "gradient_norms": norms, "terms": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default=";".join(ARMS), help="names, separated by semicolons")
    parser.add_argument("--seeds", default="2,3,4,5,6")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--per-family", type=int, default=100)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--training-sets", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path("/tmp/alignkd-evidence"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    flags.output.mkdir(parents=True, exist_ok=True)
    for seed in (int(seed) for seed in flags.seeds.split(",")):
        for name in flags.arms.split(";"):
            path = flags.output / f"{name.replace(', ', '_').replace(' ', '-')}.{flags.scenes}.{seed}.json"
            if path.is_file():
                continue
            result = {"arm": name} | run(ARMS[name], seed, flags, flags.data / f"work-{os.getpid()}")
            path.write_text(json.dumps(result) + "\n")
            mean = {split: sum(found.values()) / len(found) for split, found in result["accuracy"].items()}
            print(f"{name} seed {seed}: {mean} {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
