"""DistillConfig -> trained Hugging Face checkpoint directory, by transformers.Trainer; a broken-off run can go on."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from bundle.staging import write_text_whole
from bundle.tokenizer import open_tokenizer
from distill.align_kd.module import AlignKD
from distill.batches.collator import Collator
from distill.batches.dataset import LlavaDataset
from distill.batches.image_store import ImageStore, OtherRowsImages
from distill.data.rows import IndexedRows, open_rows
from distill.evaluation.held_out import read_held_out
from distill.models import load_vlm
from distill.models.processing import Processing, read_processing
from distill.settings.training import DistillConfig
from distill.teacher.open_teacher import chosen_processing, open_teacher, place_teacher
from distill.teacher_cache.choice import open_recording
from distill.training.adapter_start import fit_visual_maps
from distill.training.arguments import training_arguments
from distill.training.bad_images import BadImages
from distill.training.features import known_features
from distill.training.finish import finish
from distill.training.module import make_module
from distill.training.progress import ProgressLine
from distill.training.ranks import Ranks
from distill.training.stop_signals import Stopped, StopSignals
from distill.training.tracking import trackers
from distill.training.training_loop import DistillTrainer
from distill.training.work_folder import (
    ROW_INDEX,
    SETTINGS_FILE,
    check_output,
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
            rows = _rows(config)
            module, processing, dataset, collator = _open(config, rows, console)
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
            finish(trainer, ranks, config, processing, rows, time.monotonic() - begun)
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


def _stopped(config: DistillConfig, step: int, number: int) -> Stopped:
    return Stopped(f"stopped at step {step}; its checkpoint is kept in {config.work}: continue with --resume", number)
