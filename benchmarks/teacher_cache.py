"""Size of the teacher cache against the error that it brings into losses and gradients, on the demo world.

    OMP_NUM_THREADS=1 python benchmarks/teacher_cache.py --json docs/teacher_cache.json

For each storage a cache is recorded with ``alignkd-distill cache``'s own code and every term is computed from it and
from the running teacher, on the same batches and the same student: once fresh, once after ``--steps`` steps of plain
training. Prints Markdown: KB per conversation, |g - g_live| / |g_live| over all of the student's gradient, and the
relative error of the term's value. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from bundle.tokenizer import open_tokenizer
from distill.align_kd.module import AlignKD
from distill.batches.collator import Collator
from distill.batches.dataset import Example, LlavaDataset
from distill.batches.image_store import ImageStore
from distill.data.rows import read_rows
from distill.demo_world.demo_benchmarks import make_demo
from distill.models import load_vlm
from distill.models.processing import read_processing
from distill.settings.recording import CacheConfig, CacheStorage
from distill.settings.terms import DIVERGENCE_TERMS, TermWeights
from distill.settings.training import DistillConfig
from distill.teacher_cache.record import record
from distill.teacher_cache.search import CacheSearch
from distill.training.run import train
from runtime_bench.device import local_device

ROOT = Path(__file__).parents[1]
TEACHER, STUDENT = ROOT / "distill" / "demo_teacher", ROOT / "distill" / "demo_student"
WORDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1 << 20)
COLUMNS = (1, 2, 4, 0)
ATTENTION, HEADS, VISUAL = ("attention_kl",), ("attention",), ("visual", "focus", "normed_visual", "relation")
# what is stored -> the terms that read it
CURVE: list[tuple[str, CacheStorage, tuple[str, ...]]] = [
    *((f"{'all' if words > 1 << 16 else words} words", CacheStorage(words=words), DIVERGENCE_TERMS) for words in WORDS),
    ("all words, float32", CacheStorage(words=WORDS[-1], precision="float32"), DIVERGENCE_TERMS),
    *(
        (f"{columns or 'all'} columns of the head mean", CacheStorage(columns=columns), ATTENTION)
        for columns in COLUMNS
    ),
    ("every head", CacheStorage(), HEADS),
    ("visual tokens, focus", CacheStorage(), VISUAL),
]
Terms = dict[str, tuple[float, torch.Tensor]]  # name -> value, gradient


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=96, help="conversations' pictures")
    parser.add_argument("--batch", type=int, default=16, help="conversations in a batch")
    parser.add_argument("--batches", type=int, default=4, help="over which errors are taken together")
    parser.add_argument("--steps", type=int, default=300, help="of plain training before the second student")
    parser.add_argument("--json", type=Path, help="also write every number there")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_demo(data, 0, flags.scenes, 3)
        base = DistillConfig(
            student=STUDENT, teacher=TEACHER, data=data / "train.json", output=Path(folder) / "trained", losses="ce"
        )
        students = {"fresh": STUDENT}
        if flags.steps:
            plain = replace(base, teacher=None, max_steps=flags.steps, learning_rate=3e-3)
            students[f"after {flags.steps} steps"] = train(plain, Console(quiet=True))
        rows = [
            point(name, storage, terms, base, students, flags.batch, flags.batches) for name, storage, terms in CURVE
        ]
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": local_device().cpu,
        "scenes": flags.scenes,
        "conversations compared": flags.batch * flags.batches,
        "steps": flags.steps,
    }
    sys.stdout.write(table(rows) + "\n" + ", ".join(f"{name} {value}" for name, value in conditions.items()) + "\n")
    if flags.json is not None:
        flags.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def point(
    name: str,
    storage: CacheStorage,
    terms: tuple[str, ...],
    base: DistillConfig,
    students: dict[str, Path],
    size: int,
    batches: int,
) -> dict[str, object]:
    """One storage: its bytes, and the errors of the terms that read it."""
    wanted = replace(base, weights=TermWeights(**dict.fromkeys(terms, 1.0)))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        done = record(
            CacheConfig(
                cache=cache, teacher=TEACHER, data=base.data, losses="ce", weights=wanted.weights, storage=storage
            ),
            Console(quiet=True),
        )
        errors = {
            label: errors_of(replace(wanted, cache=cache, student=path), terms, size, batches)
            for label, path in students.items()
        }
    return {"stored": name, "bytes": done.shard_bytes / done.conversations, "errors": errors}


def errors_of(config: DistillConfig, terms: tuple[str, ...], size: int, batches: int) -> dict[str, dict[str, float]]:
    """Term -> relative error of its gradient and of its value, over some batches."""
    student, processing = load_vlm(config.student), read_processing(config.student)
    tokenizer = open_tokenizer(processing.tokenizer, config.student)
    rows = read_rows(config.data, config.image_folder)
    context = student.config.text_config.max_position_embeddings
    dataset = LlavaDataset(rows, processing, tokenizer, context, student.config.visual_tokens)
    examples: list[Example] = [dataset[i] for i in range(len(dataset))]
    search = CacheSearch(config, student, processing)
    cache = search.chosen(search.lacking(examples))
    collator = Collator(processing.tokenizer.pad_id, ImageStore(processing.image, 0), recording=cache)
    live = AlignKD(student, load_vlm(TEACHER), config.term_weights)
    cached = AlignKD(student, None, config.term_weights, recorded_teacher=cache.shape)
    squares = {name: [0.0, 0.0, 0.0, 0.0] for name in terms}  # of gradient's error, gradient, value's error, value
    for start in range(0, size * batches, size):
        batch = collator(examples[start : start + size])
        found = values_of(cached, batch, terms)
        del batch["recorded"]
        for name, (value, gradient) in values_of(live, batch, terms).items():
            parts = (found[name][1] - gradient, gradient, torch.tensor(found[name][0] - value), torch.tensor(value))
            squares[name] = [
                total + part.square().sum().item() for total, part in zip(squares[name], parts, strict=True)
            ]
    return {
        name: {"gradient": (off / of) ** 0.5, "value": (value_off / value) ** 0.5}
        for name, (off, of, value_off, value) in squares.items()
    }


def values_of(module: AlignKD, batch: dict[str, torch.Tensor], terms: tuple[str, ...]) -> Terms:
    """Every term's value and its gradient into the student."""
    parameters = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
    computed = module(**batch)
    result = {}
    for name in terms:
        found = torch.autograd.grad(computed[name], parameters, retain_graph=True, allow_unused=True)
        result[name] = (computed[name].item(), torch.cat([g.flatten() for g in found if g is not None]))
    return result


def table(rows: list[dict[str, object]]) -> str:
    """Markdown, one table for each set of terms and student."""
    lines: list[str] = []
    heading = None
    students = list(rows[0]["errors"])  # type: ignore[call-overload]
    for label in students:
        for row in rows:
            errors = row["errors"][label]  # type: ignore[index]
            names = f"| {label}: stored | KB | " + " | ".join(errors) + " |"
            if names != heading:
                heading = names
                lines += ["", names, "|---|---:|" + "---:|" * len(errors)]
            cells = [f"{one['gradient']:.1e} / {one['value']:.0e}" for one in errors.values()]
            lines.append(f"| {row['stored']} | {row['bytes'] / 1e3:.2f} | " + " | ".join(cells) + " |")  # type: ignore[operator]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
