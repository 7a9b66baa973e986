"""A finished run -> the model card (README.md) of its checkpoint: the command, the data, what the terms came to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from distill.settings.training import DistillConfig

HEADER = "---\nlibrary_name: alignkd\npipeline_tag: image-text-to-text\ntags:\n- alignkd\n- mobilevlm\n---\n"
OPEN = "```python\nfrom distill.models import load_vlm\n\nvlm = load_vlm(path)\n```\n"


@dataclass(frozen=True)
class RunFacts:
    """What is known only after training."""

    steps: int
    rows: int
    rows_per_step: int
    engine: str  # processes, what shares their work, precision
    data_sha256: str
    seconds: float
    parameters: int
    trainable: int
    terms: Mapping[str, float]  # mean over the last log entry
    gradient_norms: Mapping[str, float]  # last measurement, weighted
    eval_rows: int
    eval_sha256: str | None
    accuracy: Mapping[str, float]  # percent per family of the held-out rows, last evaluation
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
        f"- {facts.steps} steps of {facts.rows_per_step} conversations in {facts.seconds:.0f} s, {facts.engine}",
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
        *_accuracy_lines(config, facts),
        "Made by:",
        "",
        f"```sh\n{command_line(config)}\n```",
        "",
        "All settings, which `alignkd-distill --recipe FILE` reads:",
        "",
        f"```yaml\n{recipe_text(config)}```",
        "",
        OPEN,
    ]
    return "\n".join(lines)


def recipe_text(config: DistillConfig) -> str:
    """Every setting as the YAML of a recipe."""
    plain = json.loads(json.dumps(asdict(config), default=str))
    return yaml.safe_dump({name: value for name, value in plain.items() if name != "resume"}, sort_keys=False)


def _accuracy_lines(config: DistillConfig, facts: RunFacts) -> list[str]:
    if config.eval_data is None:
        return []
    table = [f"| {family} | {value:.1f} |" for family, value in facts.accuracy.items()]
    return [
        f"Answers of `{config.eval_data}` (sha256 `{facts.eval_sha256}`, {facts.eval_rows} conversations) that greedy",
        "decoding gets right to the last token:",
        "",
        "| family | % |",
        "|---|---|",
        *table,
        "",
    ]


def command_line(config: DistillConfig) -> str:
    """The command that repeats the run: every setting that differs from its default."""
    words = ["alignkd-distill", *_flags(config, "--")]
    return shlex.join(words)


def _flags(settings: object, prefix: str) -> Sequence[str]:
    words: list[str] = []
    for setting in fields(settings):  # type: ignore[arg-type]
        value, flag = vars(settings)[setting.name], prefix + setting.name.replace("_", "-")
        if setting.name in ("weights", "lora"):
            words += _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            words += [] if value == setting.default else [flag if value else flag.replace("--", "--no-")]
        elif isinstance(value, tuple) and value != setting.default:
            words += [flag, *value]
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
