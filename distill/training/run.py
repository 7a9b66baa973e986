"""DistillConfig -> trained Hugging Face checkpoint directory, by transformers.Trainer; a broken-off run can go on."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
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
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.settings.training import DistillConfig
from distill.teacher.open_teacher import chosen_processing, open_teacher, place_teacher
from distill.teacher_cache.cache import TeacherCache
from distill.training.adapter_start import fit_visual_maps
from distill.training.arguments import training_arguments
from distill.training.bad_images import BadImages
from distill.training.features import Features, everyones_features, known_features
from distill.training.finish import finish
from distill.training.module import make_module
from distill.training.progress import ProgressLine
from distill.training.ranks import Ranks
from distill.training.recording import find_recording
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
            pair = _open_pair(config, rows, console)
        recording = find_recording(config, ranks, pair.student, pair.processing, pair.dataset, console)
        stop = StopSignals(ranks)
        with ranks.agreed():
            module, collator = _module_and_collator(config, pair, recording)
            trainer = _trainer(config, args, ranks, module, pair, collator, stop, console)
            for part in (module.student.vision_tower, module.student.projector):  # an engine that shards moves none
                nn.Module.to(part, args.device)
        begun = time.monotonic()
        if recording is None or not recording.has_features:
            collator.features = _features(config, ranks, module, rows, collator)
        checkpoint = ranks.told(last_checkpoint(config.work))
        with ranks.agreed():
            if config.adapter_init == "fit" and checkpoint is None:  # which brings the maps as they were trained
                fit_visual_maps(module, pair.dataset, collator)
        if ranks.main:
            write_text_whole(config.work / SETTINGS_FILE, json.dumps(settings_of(config), indent=1) + "\n")
        with ranks.first_failure_only(), stop, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP, of small convolutions' weights
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.state.max_steps and stop.received:
            raise _stopped(config, trainer.state.global_step, stop.received)
        with ranks.agreed():
            finish(trainer, ranks, config, pair.processing, rows, time.monotonic() - begun)
        ranks.wait()
    return config.output


def _rows(config: DistillConfig) -> IndexedRows:
    rows = open_rows(config.data, config.image_folder, config.work / ROW_INDEX)
    rows.check(missing_images=config.on_bad_image == "stop")
    return rows


@dataclass(frozen=True)
class _Pair:
    """Student, teacher and data, opened; ``theirs`` is the teacher's processing, or the student's without a teacher."""

    student: MobileVlm
    teacher: MobileVlm | None
    processing: Processing
    theirs: Processing
    dataset: LlavaDataset


def _open_pair(config: DistillConfig, rows: IndexedRows, console: Console) -> _Pair:
    console.print(f"{len(rows)} conversations, {int(rows.with_image.sum())} with an image", soft_wrap=True)
    student, processing = load_vlm(config.student), chosen_processing(read_processing(config.student), config)
    teacher, theirs = None, processing
    if config.cache is None:
        teacher, theirs = open_teacher(config, student, processing, console)
    tokenizer = open_tokenizer(processing.tokenizer, config.student)
    context = student.config.text_config.max_position_embeddings
    dataset = LlavaDataset(rows, processing, tokenizer, context, student.config.visual_tokens)
    return _Pair(student, teacher, processing, theirs, dataset)


def _module_and_collator(
    config: DistillConfig, pair: _Pair, recording: TeacherCache | None
) -> tuple[AlignKD, Collator]:
    same_pictures = pair.theirs.image == pair.processing.image and not config.shuffled_teacher
    recorded = None if recording is None else recording.shape
    module = make_module(config, pair.student, pair.teacher, same_pictures, recorded)
    if config.gradient_checkpointing:
        pair.student.language_model.activation_checkpointing_enable({"use_reentrant": False})
    budget = (config.cache_mb << 20) // (1 if same_pictures else 2)
    teacher_images: ImageStore | OtherRowsImages | None = None
    if not same_pictures:
        images = ImageStore(pair.theirs.image, budget)
        teacher_images = OtherRowsImages(images, pair.dataset.rows) if config.shuffled_teacher else images
    collator = Collator(
        pair.processing.tokenizer.pad_id,
        ImageStore(pair.processing.image, budget),
        report_bad=True,
        teacher_images=teacher_images,
        recording=recording,
    )
    return module, collator


def _features(
    config: DistillConfig, ranks: Ranks, module: AlignKD, rows: IndexedRows, collator: Collator
) -> Features | None:
    """Every image's features, a share of them computed here."""
    with ranks.agreed():
        share, skips = (ranks.index, ranks.count), config.on_bad_image == "skip"
        mine = known_features(module, rows, collator.images, config.cache_mb << 20, skips, share)
    return None if mine is None else everyones_features(mine, ranks, module)


def _trainer(
    config: DistillConfig,
    args: TrainingArguments,
    ranks: Ranks,
    module: AlignKD,
    pair: _Pair,
    collator: Collator,
    stop: StopSignals,
    console: Console,
) -> DistillTrainer:
    held_out = None
    if config.eval_data is not None:
        held_out = read_held_out(
            config.eval_data,
            config.eval_rows,
            pair.processing,
            open_tokenizer(pair.processing.tokenizer, config.student),
            module.student.config.text_config.max_position_embeddings,
            config.batch_size,
        )
    callbacks: list[TrainerCallback] = [stop]
    if ranks.main:
        callbacks += [ProgressLine(console), *trackers(config)]
    bad_images = BadImages(
        pair.dataset.rows,
        collator.images,
        config.on_bad_image,
        config.work,
        console,
        ranks.index,
        step_of(last_checkpoint(config.work)),
    )
    trainer = DistillTrainer(module, config, args, ranks, pair.dataset, collator, held_out, bad_images, callbacks)
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
