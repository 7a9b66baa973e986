"""A finished run -> the model card (README.md) of its checkpoint: the command, the data, what the terms came to."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from distill.config import DistillConfig

HEADER = "---\nlibrary_name: alignkd\npipeline_tag: image-text-to-text\ntags:\n- alignkd\n- mobilevlm\n---\n"
OPEN = "```python\nfrom distill.models import load_vlm\n\nvlm = load_vlm(path)\n```\n"


@dataclass(frozen=True)
class RunFacts:
    """What is known only after training."""

    steps: int
    rows: int
    data_sha256: str
    seconds: float
    parameters: int
    trainable: int
    terms: Mapping[str, float]  # mean over the last log entry
    gradient_norms: Mapping[str, float]  # last measurement, weighted
    rows_left_out: int = 0  # different rows whose image could not be read
    left_out_first: Sequence[str] = ()  # the first of them, with the reason


def render_card(config: DistillConfig, facts: RunFacts) -> str:
    """The whole card as Markdown."""
    teacher = f"`{config.teacher}`" if config.needs_teacher else "none"
    lines = [
        f"{HEADER}",
        f"# {config.output.name}",
        "",
        f"MobileVLM V2, trained by alignkd with losses `{config.losses}`.",
        "",
        f"- student: `{config.student}`; teacher: {teacher}",
        f"- data: `{config.data}`, {facts.rows} conversations, sha256 `{facts.data_sha256}`",
        f"- {facts.steps} steps in {facts.seconds:.0f} s",
        f"- {facts.trainable:,} of {facts.parameters:,} parameters trained",
        *_left_out_lines(facts),
        "",
        "| term | weight | last value | gradient norm |",
        "|---|---|---|---|",
        *(_term_line(name, weight, facts) for name, weight in config.term_weights.items()),
        "",
        "Values are means over the last log entry, on training data; gradient norms are of the weighted term into the",
        "student at the last measurement. `training_log.json` holds all of them.",
        "",
        "Made by:",
        "",
        f"```sh\n{command_line(config)}\n```",
        "",
        OPEN,
    ]
    return "\n".join(lines)


def command_line(config: DistillConfig) -> str:
    """The command that repeats the run: every setting that differs from its default."""
    words = ["alignkd-distill", *_flags(config, "--")]
    return shlex.join(words)


def _flags(settings: object, prefix: str) -> Sequence[str]:
    words: list[str] = []
    for setting in fields(settings):  # type: ignore[arg-type]
        value, flag = vars(settings)[setting.name], prefix + setting.name.replace("_", "-")
        if setting.name == "weights":
            words += _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            words += [] if value == setting.default else [flag if value else flag.replace("--", "--no-")]
        elif value != setting.default:
            words += [flag, value.as_posix() if isinstance(value, Path) else str(value)]
    return words


def _left_out_lines(facts: RunFacts) -> list[str]:
    if not facts.rows_left_out:
        return []
    listed = [f"  - {reason}" for reason in facts.left_out_first]
    return [f"- {facts.rows_left_out} rows were left out, their image could not be read; the first:", *listed]


def _term_line(name: str, weight: float, facts: RunFacts) -> str:
    norm = facts.gradient_norms.get(name)
    value = facts.terms.get(name)
    shown = "" if value is None else f"{value:.4g}"
    return f"| {name} | {weight:g} | {shown} | {'' if norm is None else f'{norm:.3g}'} |"
