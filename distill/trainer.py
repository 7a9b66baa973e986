"""DistillConfig -> trained Hugging Face checkpoint directory, by transformers.Trainer; a broken-off run can go on."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from bundle.staging import refuse_existing, sha256_of, write_text_whole
from bundle.tokenizer import open_tokenizer
from distill.accuracy import read_held_out
from distill.adapter_start import fit_visual_maps
from distill.align_kd import AlignKD, TermSettings
from distill.bad_images import SHOWN, BadImages, read_all
from distill.cache_choice import open_recording
from distill.config import DistillConfig
from distill.data import Collator, ImageStore, LlavaDataset
from distill.features import known_features
from distill.image_store import OtherRowsImages
from distill.lora import FOLDER as LORA_FOLDER
from distill.lora import add_lora, save_lora
from distill.model_card import RunFacts, render_card
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.models.save import save_checkpoint
from distill.parameter_groups import STUDENT
from distill.progress import ProgressLine
from distill.ranks import Ranks
from distill.rows import IndexedRows, open_rows
from distill.stop_signals import Stopped, StopSignals
from distill.teacher import chosen_processing, open_teacher, place_teacher
from distill.teacher_view import TeacherShape
from distill.tracking import trackers
from distill.training_loop import DistillTrainer, training_arguments
from distill.work_folder import (
    ROW_INDEX,
    SETTINGS_FILE,
    check_output,
    every_setting,
    kept_if_resumable,
    last_checkpoint,
    settings_of,
    step_of,
)


def train(config: DistillConfig, console: Console | None = None) -> Path:
    """Run the training that ``config`` describes and return the new checkpoint directory.

    Under accelerate or torchrun every process calls this; the main one alone checks and writes the output.

    Raises:
        UsageError: a checkpoint, the data or the output directory is not usable; nothing is written then.
        Stopped: a signal asked for the end; the run lies in the work folder.
    """
    args = training_arguments(config)
    ranks = Ranks(args.distributed_state)
    console = ranks.console(console)
    if ranks.told(config.resume and config.output.exists()):
        console.print(f"{config.output} is finished already", soft_wrap=True)
        return config.output
    with ranks.agreed():
        if ranks.main:
            check_output(config)
    with kept_if_resumable(config.work, console, ranks.main):
        with ranks.agreed():
            if ranks.main:  # it writes the index of the rows, which the others read
                _rows(config)
        with ranks.agreed():
            module, processing, dataset, collator = _open(config, _rows(config), console)
        stop = StopSignals(ranks)
        with ranks.agreed():
            trainer = _trainer(config, args, ranks, module, processing, dataset, collator, stop, console)
            begun = time.monotonic()
            nn.Module.to(module.student.vision_tower, args.device)
            if collator.recording is None or not collator.recording.has_features:
                budget = config.cache_mb << 20
                collator.features = known_features(  # on the trainer's device
                    module, dataset.rows, collator.images, budget, leave_out_bad=config.on_bad_image == "skip"
                )
            if config.adapter_init == "fit":
                fit_visual_maps(module, dataset, collator)
        if ranks.main:
            write_text_whole(config.work / SETTINGS_FILE, json.dumps(settings_of(config), indent=1) + "\n")
        checkpoint = ranks.told(last_checkpoint(config.work))
        with ranks.first_failure_only(), stop, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP, of small convolutions' weights
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.state.max_steps and stop.received:
            raise _stopped(config, trainer.state.global_step, stop.received)
        with ranks.agreed():
            _finish(trainer, ranks, config, processing, time.monotonic() - begun)
        ranks.wait()
    return config.output


def _rows(config: DistillConfig) -> IndexedRows:
    rows = open_rows(config.data, config.image_folder, config.work / ROW_INDEX)
    rows.check(missing_images=config.on_bad_image == "stop")
    return rows


def _open(
    config: DistillConfig, rows: IndexedRows, console: Console
) -> tuple[AlignKD, Processing, LlavaDataset, Collator]:
    console.print(f"{len(rows)} conversations, {int(rows.with_image.sum())} with an image", soft_wrap=True)
    student, processing = load_vlm(config.student), chosen_processing(read_processing(config.student), config)
    teacher, theirs = None, processing
    if config.cache is None:
        teacher, theirs = open_teacher(config, student, processing, console)
    same_pictures = theirs.image == processing.image and not config.shuffled_teacher
    tokenizer = open_tokenizer(processing.tokenizer, config.student)
    context = student.config.text_config.max_position_embeddings
    dataset = LlavaDataset(rows, processing, tokenizer, context, student.config.visual_tokens)
    recording = open_recording(config, student, processing, dataset, console)
    module = make_module(config, student, teacher, same_pictures, None if recording is None else recording.shape)
    if config.gradient_checkpointing:
        student.language_model.activation_checkpointing_enable({"use_reentrant": False})
    budget = (config.cache_mb << 20) // (1 if same_pictures else 2)
    collator = Collator(
        processing.tokenizer.pad_id,
        ImageStore(processing.image, budget),
        report_bad=True,
        teacher_images=None if same_pictures else _teacher_images(config, ImageStore(theirs.image, budget), rows),
        recording=recording,
    )
    return module, processing, dataset, collator


def _teacher_images(config: DistillConfig, images: ImageStore, rows: IndexedRows) -> ImageStore | OtherRowsImages:
    return OtherRowsImages(images, rows) if config.shuffled_teacher else images


def _trainer(
    config: DistillConfig,
    args: TrainingArguments,
    ranks: Ranks,
    module: AlignKD,
    processing: Processing,
    dataset: LlavaDataset,
    collator: Collator,
    stop: StopSignals,
    console: Console,
) -> DistillTrainer:
    held_out = None
    if config.eval_data is not None:
        held_out = read_held_out(
            config.eval_data,
            config.eval_rows,
            processing,
            open_tokenizer(processing.tokenizer, config.student),
            module.student.config.text_config.max_position_embeddings,
            config.batch_size,
        )
    callbacks: list[TrainerCallback] = [stop]
    if ranks.main:
        callbacks += [ProgressLine(console), *trackers(config)]
    bad_images = BadImages(
        dataset.rows,
        collator.images,
        config.on_bad_image,
        config.work,
        console,
        ranks.index,
        step_of(last_checkpoint(config.work)),
    )
    trainer = DistillTrainer(module, config, args, ranks, dataset, collator, held_out, bad_images, callbacks)
    if module.teacher is not None:
        place_teacher(module.teacher, config, args.device)
    if config.grad_norm_steps and not trainer.measures_gradients:
        console.print(
            "each term's gradient norm is measured under DDP and in one process only: weights are sharded here",
            soft_wrap=True,
        )
    return trainer


def make_module(
    config: DistillConfig,
    student: MobileVlm,
    teacher: MobileVlm | None,
    same_pictures: bool = True,
    recorded: TeacherShape | None = None,
) -> AlignKD:
    """The module that the settings train, low-rank updates included."""
    module = AlignKD(
        student,
        teacher,
        config.term_weights,
        term_settings(config),
        config.freeze_tower,
        config.learned_balance,
        config.seed,
        same_pictures,
        recorded,
    )
    if config.lora.rank:
        add_lora(student, config.lora)
    return module


def term_settings(config: DistillConfig) -> TermSettings:
    """The part of the settings that the loss terms are computed with."""
    return TermSettings(
        temperature=config.divergence_temperature,
        mask=config.mask,
        label_smoothing=config.label_smoothing,
        top_k=config.top_k,
        attention_by_mass=config.attention_by_mass,
    )


def _stopped(config: DistillConfig, step: int, number: int) -> Stopped:
    return Stopped(f"stopped at step {step}; its checkpoint is kept in {config.work}: continue with --resume", number)


def _finish(
    trainer: DistillTrainer, ranks: Ranks, config: DistillConfig, processing: Processing, seconds: float
) -> None:
    """Build the checkpoint inside the work folder, rename it to the output, and drop the rest."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part where it is sharded
    if not ranks.main:
        return
    module, history = trainer.align, trainer.state.log_history
    rows, left_out = _rows(config), {one.row: one.reason for one in read_all(config.work)}
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
