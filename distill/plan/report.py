"""Plan -> the text that --dry-run prints, and the same as JSON values."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from distill.plan.plan import Plan, Trained
from distill.settings.training import DistillConfig


def plan_lines(plan: Plan, config: DistillConfig, every_parameter: bool) -> list[str]:
    """The plan for a reader; parameters of one kind are one line unless ``every_parameter``."""
    memory = plan.memory
    total = sum(one.count for one in plan.trained)
    lines = [
        f"trained: {total:,} parameters in {len(plan.trained)} tensors, of {plan.student_parameters:,} in the student",
        _teacher_line(plan, config),
        "",
        f"{'group':<10} {'learning rate':>13} {'parameters':>14} {'tensors':>7}  name",
        *(_parameter_line(*row) for row in _rows(plan.trained, every_parameter)),
        "",
        f"memory per GPU, {plan.gpus} x {plan.engine}, {'bf16 autocast' if config.bf16 else 'float32'}:",
        *(f"  {name:<12} {size(value):>10}" for name, value in (*asdict(memory).items(), ("total", memory.total))),
        "  weights, gradients and optimizer are exact, activations an estimate for the longest sampled row",
        "",
        f"data: {plan.rows:,} rows, {plan.images:,} images; positions per row {plan.positions[0]:.0f} on average, "
        f"{plan.positions[1]} at most (sample)",
        f"steps: {plan.steps:,} ({plan.steps_per_epoch:,} an epoch), each of {plan.rows_per_step} rows: batch "
        f"{config.batch_size} x {plan.gpus} GPUs x {config.gradient_accumulation} accumulated",
        f"tower features of all images: {size(plan.features_bytes)}, "
        + ("kept in memory" if plan.features_kept else "computed in every step (--cache-mb, --freeze-tower)"),
        *(
            []
            if plan.cache_bytes is None
            else [f"teacher cache: at most {size(plan.cache_bytes)} (alignkd-distill cache)"]
        ),
        "time: give --step-time-s SECONDS" if plan.hours is None else f"time: {plan.hours:.1f} hours",
    ]
    return lines


def _teacher_line(plan: Plan, config: DistillConfig) -> str:
    if plan.teacher_parameters:
        return f"teacher: {plan.teacher_parameters:,} parameters, frozen"
    return f"teacher: recorded in {config.cache}, not run" if config.cache and config.needs_teacher else "teacher: none"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, every parameter by itself."""
    values = asdict(plan)
    values["memory_bytes"] = values.pop("memory") | {"total": plan.memory.total}
    values["trained"] = [asdict(one) | {"count": one.count} for one in plan.trained]
    return values


def size(count: int) -> str:
    """Bytes for a reader, in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.2f} {units[0]}"


def _rows(trained: tuple[Trained, ...], every_parameter: bool) -> list[tuple[Trained, int, int]]:
    """One line each: a parameter, how many it stands for, and in how many tensors."""
    together: dict[tuple[str, str], list[Trained]] = defaultdict(list)
    for one in trained:
        together[one.group, one.name if every_parameter else one.pattern].append(one)
    return [(some[0], sum(one.count for one in some), len(some)) for some in together.values()]


def _parameter_line(one: Trained, count: int, tensors: int) -> str:
    name = one.pattern if tensors > 1 else one.name
    return f"{one.group:<10} {one.learning_rate:>13g} {count:>14,} {tensors:>7}  {name}"
