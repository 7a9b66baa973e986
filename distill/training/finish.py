"""A trained module -> the checkpoint directory: built inside the work folder, then renamed to the output."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from bundle.staging import refuse_existing, sha256_of, write_text_whole
from distill.data.rows import IndexedRows
from distill.models import load_vlm
from distill.models.processing import Processing
from distill.models.save import save_checkpoint
from distill.settings.training import DistillConfig
from distill.training.bad_images import SHOWN, read_all
from distill.training.lora import FOLDER as LORA_FOLDER
from distill.training.lora import add_lora, save_lora
from distill.training.model_card import RunFacts, render_card
from distill.training.parameter_groups import STUDENT
from distill.training.ranks import Ranks
from distill.training.training_loop import DistillTrainer
from distill.training.work_folder import (
    every_setting,
)


def finish(
    trainer: DistillTrainer,
    ranks: Ranks,
    config: DistillConfig,
    processing: Processing,
    rows: IndexedRows,
    seconds: float,
) -> None:
    """Build the checkpoint inside the work folder, rename it to the output, and drop the rest."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part where it is sharded
    if not ranks.main:
        return
    module, history = trainer.align, trainer.state.log_history
    left_out = {one.row: one.reason for one in read_all(config.work)}
    facts = RunFacts(
        steps=trainer.state.global_step,
        rows=len(rows),
        rows_per_step=config.batch_size * config.gradient_accumulation * ranks.count,
        engine=trainer.engine,
        data_sha256=rows.sha256,
        seconds=seconds,
        parameters=sum(p.numel() for p in module.student.parameters()),
        trainable=sum(p.numel() for p in module.student.parameters() if p.requires_grad),
        terms=_last(history, "term/"),
        gradient_norms=_last(history, "gradient_norm/"),
        eval_rows=trainer.held_out_rows,
        eval_sha256=sha256_of(config.eval_data) if config.eval_data is not None else None,
        accuracy=_last(history, "accuracy/"),
        rows_left_out=len(left_out),
        left_out_first=list(left_out.values())[:SHOWN],
    )
    final = config.work / "final"
    shutil.rmtree(final, ignore_errors=True)
    _save_student(state, config, processing, render_card(config, facts), final)
    adapters = {name: value.contiguous() for name, value in state.items() if not name.startswith(STUDENT)}
    if adapters:
        save_file(adapters, final / "adapters.safetensors")
    log = {"settings": every_setting(config), "facts": asdict(facts), "rows_left_out": left_out, "log": history}
    write_text_whole(final / "training_log.json", json.dumps(log, indent=1) + "\n")
    if (events := config.work / "tensorboard").is_dir():
        shutil.move(events, final / "tensorboard")
    refuse_existing(config.output)
    os.rename(final, config.output)
    shutil.rmtree(config.work)


def _save_student(
    state: dict[str, torch.Tensor], config: DistillConfig, processing: Processing, card: str, final: Path
) -> None:
    """The gathered weights in a fresh student, low-rank updates merged: the same files whatever engine trained them."""
    student = load_vlm(config.student)
    tuner = add_lora(student, config.lora) if config.lora.rank else None
    student.load_state_dict({n.removeprefix(STUDENT): value for n, value in state.items() if n.startswith(STUDENT)})
    final.mkdir()
    if tuner is not None:
        save_lora(tuner, final / LORA_FOLDER)
        tuner.merge_and_unload()
    save_checkpoint(student, final, processing, card)


def _last(history: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """Values of the latest log entry that has names with ``prefix``."""
    found = [{key: value for key, value in entry.items() if key.startswith(prefix)} for entry in history]
    latest = next((entry for entry in reversed(found) if entry), {})
    return {key.removeprefix(prefix): value for key, value in latest.items()}
