"""alignkd-distill: checkpoints + data -> trained student, or the plan of it; ``cache``, ``init``, ``launch`` too."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from bundle.errors import UsageError, VerificationError, missing_extra, run_command
from distill.launch.configs import launch_config, launch_configs, purpose
from distill.settings.fresh_student import InitConfig
from distill.settings.recipe import with_recipe
from distill.settings.recording import CacheConfig
from distill.settings.training import DistillConfig

DESCRIPTION = (
    "Distil a vision-language model with Align-KD (or train it plainly with --losses ce). "
    "Settings from a YAML file: --recipe FILE; flags win over it. "
    "On several GPUs: accelerate launch --config_file $(alignkd-distill launch NAME) -m distill.cli FLAGS. "
    "Configurations for that: alignkd-distill launch. "
    "A fresh student with its teacher's tower: alignkd-distill init --help. "
    "A teacher recorded once instead of run at every step: alignkd-distill cache --help"
)


@dataclass(frozen=True)
class Planning:
    """The plan of a run instead of the run."""

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what would be trained, the memory per GPU, steps and hours; train nothing."""
    verbose: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-v"])] = False
    """In the plan, one line for every parameter."""
    gpus: int = 1
    """GPUs of the plan."""
    engine: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """What shares the work in the plan."""
    step_time_s: float | None = None
    """Seconds per optimizer step; the plan then says the hours."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or (self.step_time_s is not None and not self.step_time_s > 0):
            raise UsageError(f"--gpus {self.gpus} and --step-time-s {self.step_time_s} must be above 0")


def distill(
    config: Annotated[DistillConfig, tyro.conf.arg(name="")],
    planning: Annotated[Planning, tyro.conf.arg(name="")],
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Train and print the new checkpoint's path.

    Args:
        json: end with one line of JSON.
    """
    _need_torch()
    if planning.dry_run:
        _print_plan(config, planning, json)
        return
    from distill.training.run import train

    output = train(config)
    if not _main_process():
        return
    facts = jsonlib.loads((output / "training_log.json").read_text(encoding="utf-8"))["facts"]
    terms = ", ".join(f"{name} {value:.4g}" for name, value in facts["terms"].items())
    print(f"{output}: {facts['steps']} steps, {terms}")
    if json:
        print(jsonlib.dumps({"checkpoint": str(output), **facts}))


def _print_plan(config: DistillConfig, planning: Planning, json: bool) -> None:
    from distill.plan.plan import make_plan
    from distill.plan.report import plan_json, plan_lines

    plan = make_plan(config, planning.gpus, planning.engine, planning.step_time_s)
    for line in plan_lines(plan, config, planning.verbose):
        print(line)
    if json:
        print(jsonlib.dumps(plan_json(plan)))


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


def launch(name: tyro.conf.Positional[str | None] = None) -> None:
    """List the configurations for accelerate launch, or print the path of one.

    Args:
        name: a configuration, e.g. fsdp2_8gpu.
    """
    if name is not None:
        print(launch_config(name))
        return
    for known, file in launch_configs().items():
        print(f"{known:<16} {purpose(file)}")


def cache(
    config: Annotated[CacheConfig, tyro.conf.arg(name="")], json: tyro.conf.FlagCreatePairsOff[bool] = False
) -> int:
    """Record a teacher, so that training need not run it; or --verify what was recorded.

    Args:
        json: end with one line of JSON.
    """
    _need_torch()
    from distill.teacher_cache.cache import SHARDS
    from distill.teacher_cache.record import record
    from distill.teacher_cache.shards import shard_faults

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
        f"{f'{done.left_out} left out, ' if done.left_out else ''}"
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


def _main_process() -> bool:
    """Whether this is the process that speaks, of those that a launcher may have started."""
    return os.environ.get("RANK", "0") == "0"


def _command() -> int | None:
    if sys.argv[1:2] == ["cache"]:
        return tyro.cli(cache, args=sys.argv[2:], prog="alignkd-distill cache", description=cache.__doc__)
    if sys.argv[1:2] == ["init"]:
        tyro.cli(init, args=sys.argv[2:], prog="alignkd-distill init", description=init.__doc__)
    elif sys.argv[1:2] == ["launch"]:
        tyro.cli(launch, args=sys.argv[2:], prog="alignkd-distill launch")
    else:
        words = with_recipe(sys.argv[1:])
        tyro.cli(distill, args=words, prog="alignkd-distill", description=DESCRIPTION, console_outputs=_main_process())
    return None


def _quietly_elsewhere() -> int | None:
    """The command in a process that does not speak: a mistake that all see is told by the main process alone."""
    try:
        return _command()
    except UsageError as error:
        if str(error).startswith("process "):  # seen here alone
            raise
        raise SystemExit(error.exit_code) from error


def main() -> None:
    """Entry point."""
    run_command(_command if _main_process() else _quietly_elsewhere)


if __name__ == "__main__":
    main()
