"""alignkd-distill: checkpoints + LLaVA data -> trained student; ``alignkd-distill init`` makes a fresh student."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict
from typing import Annotated

import tyro

from bundle.errors import UsageError, VerificationError, missing_extra, run_command
from distill.config import CacheConfig, DistillConfig, InitConfig

DESCRIPTION = (
    "Distil a vision-language model with Align-KD (or train it plainly with --losses ce). "
    "A fresh student with its teacher's tower: alignkd-distill init --help. "
    "A teacher recorded once instead of run at every step: alignkd-distill cache --help"
)


def distill(
    config: Annotated[DistillConfig, tyro.conf.arg(name="")], json: tyro.conf.FlagCreatePairsOff[bool] = False
) -> None:
    """Train and print the new checkpoint's path.

    Args:
        json: end with one line of JSON.
    """
    _need_torch()
    from distill.trainer import train

    output = train(config)
    facts = jsonlib.loads((output / "training_log.json").read_text(encoding="utf-8"))["facts"]
    terms = ", ".join(f"{name} {value:.4g}" for name, value in facts["terms"].items())
    print(f"{output}: {facts['steps']} steps, {terms}")
    if json:
        print(jsonlib.dumps({"checkpoint": str(output), **facts}))


def init(config: Annotated[InitConfig, tyro.conf.arg(name="")]) -> None:
    """Write a fresh student that shares the teacher's vision tower and vocabulary."""
    _need_torch()
    from bundle.staging import fresh_directory
    from distill.models import load_vlm
    from distill.models.create import create_student
    from distill.models.processing import read_processing
    from distill.models.save import save_checkpoint

    teacher, processing = load_vlm(config.teacher), read_processing(config.teacher)
    student = create_student(
        teacher, config.hidden_size, config.layers, config.heads, config.intermediate_size, config.seed
    )
    with fresh_directory(config.output) as folder:
        save_checkpoint(student, folder, processing)
    print(f"{config.output}: {sum(p.numel() for p in student.parameters()):,} parameters")


def cache(
    config: Annotated[CacheConfig, tyro.conf.arg(name="")], json: tyro.conf.FlagCreatePairsOff[bool] = False
) -> int:
    """Record a teacher, so that training need not run it; or --verify what was recorded.

    Args:
        json: end with one line of JSON.
    """
    _need_torch()
    from distill.cache_shards import shard_faults
    from distill.record_teacher import record
    from distill.teacher_cache import SHARDS

    if config.verify:
        if not (config.cache / SHARDS).is_dir():
            raise UsageError(f"{config.cache} is no teacher cache: it has no folder {SHARDS}")
        faults = shard_faults(config.cache / SHARDS)
        for fault in faults:
            print(fault)
        shards = len(list((config.cache / SHARDS).glob("*.json")))
        print(f"{config.cache}: {shards - len(faults)} of {shards} shards are whole")
        if json:
            print(jsonlib.dumps({"cache": str(config.cache), "shards": shards, "faults": faults}))
        return VerificationError.exit_code if faults else 0
    done = record(config)
    print(
        f"{config.cache}: recorded {done.recorded} of {done.conversations} conversations, "
        f"{done.shard_bytes / 1e6:.1f} MB written ({done.estimated_bytes / 1e6:.1f} MB estimated)"
    )
    if json:
        print(jsonlib.dumps({"cache": str(config.cache), **asdict(done)}))
    return 0


def _need_torch() -> None:
    for package in ("torch", "transformers", "accelerate"):
        try:
            __import__(package)
        except ImportError as error:
            raise missing_extra(package, "distill") from error


def _command() -> int | None:
    if sys.argv[1:2] == ["cache"]:
        return tyro.cli(cache, args=sys.argv[2:], prog="alignkd-distill cache", description=cache.__doc__)
    if sys.argv[1:2] == ["init"]:
        tyro.cli(init, args=sys.argv[2:], prog="alignkd-distill init", description=init.__doc__)
    else:
        tyro.cli(distill, prog="alignkd-distill", description=DESCRIPTION)
    return None


def main() -> None:
    """Entry point."""
    run_command(_command)


if __name__ == "__main__":
    main()
