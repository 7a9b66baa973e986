"""DistillConfig -> trained Hugging Face checkpoint directory, by transformers.Trainer; a broken-off run can go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from bundle.errors import UsageError
from bundle.staging import refuse_existing, sha256_of, write_text_whole
from bundle.tokenizer import open_tokenizer
from distill.align_kd import AlignKD, TermSettings
from distill.config import DistillConfig
from distill.data import Collator, ImageStore, LengthGroupedOrder, LlavaDataset
from distill.features import known_features
from distill.model_card import RunFacts, render_card
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.models.save import save_checkpoint
from distill.progress import ProgressLine
from distill.rows import read_rows
from distill.work_folder import SETTINGS_FILE, check_output, kept_if_resumable, last_checkpoint, settings_of

SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}


FIT_IMAGES = 512  # images whose visual tokens fit the maps between teacher and student


def train(config: DistillConfig, console: Console | None = None, prepare: Any = None) -> Path:
    """Run the training that ``config`` describes and return the new checkpoint directory.

    Raises:
        UsageError: a checkpoint, the data or the output directory is not usable; nothing is written then.
    """
    console = console or Console(stderr=True)
    if config.resume and config.output.exists():
        console.print(f"{config.output} is finished already")
        return config.output
    check_output(config)
    rows = read_rows(config.data, config.image_folder)
    console.print(f"{len(rows)} conversations, {sum(row.image is not None for row in rows)} with an image")
    student, processing = load_vlm(config.student), read_processing(config.student)
    teacher = _open_teacher(config, student, processing, console)
    tokenizer = open_tokenizer(processing.tokenizer, config.student)
    context = student.config.text_config.max_position_embeddings
    dataset = LlavaDataset(rows, processing, tokenizer, context, student.config.visual_tokens)
    module = AlignKD(
        student,
        teacher,
        config.term_weights,
        term_settings(config),
        config.freeze_tower,
        config.learned_balance,
        config.seed,
    )
    images = ImageStore(processing.image, config.cache_mb << 20)
    collator = Collator(processing.tokenizer.pad_id, images)
    with kept_if_resumable(config.work, console):
        trainer = DistillTrainer(module, config, dataset, collator, console)
        begun = time.monotonic()
        known = config.data.parent / "features.pt"
        if known.is_file():
            collator.features = torch.load(known, weights_only=False)
        else:
            collator.features = known_features(module, rows, images, config.cache_mb << 20)  # on the trainer's device
            torch.save(collator.features, known)
        if config.adapter_init == "fit" and collator.features is not None:
            some = torch.stack(list(collator.features.values())[:FIT_IMAGES])
            module.fit_visual_maps(some.to(trainer.args.device))
        if prepare is not None:
            prepare(module, dataset, collator)
        write_text_whole(config.work / SETTINGS_FILE, json.dumps(settings_of(config), indent=1) + "\n")
        trainer.train(resume_from_checkpoint=last_checkpoint(config.work))
        _finish(trainer, config, processing, len(rows), time.monotonic() - begun)
    return config.output


class DistillTrainer(Trainer):
    """transformers.Trainer over AlignKD: its terms, their gradient norms, its parameter groups and its batch order."""

    def __init__(
        self, module: AlignKD, config: DistillConfig, dataset: LlavaDataset, collator: Collator, console: Console
    ) -> None:
        self._config, self._dataset = config, dataset
        self._sums: dict[str, torch.Tensor] = {}
        self._counted = 0
        self._gradient_norms: dict[str, float] = {}
        super().__init__(
            model=module,
            args=_arguments(config),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[ProgressLine(console)],
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        if config.report == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.add_callback(TensorBoardCallback(SummaryWriter(str(config.work / "tensorboard"))))
        if module.teacher is not None:
            nn.Module.to(module.teacher, self.args.device)

    @property
    def align(self) -> AlignKD:
        """The module without what accelerate wraps around it."""
        module = self.accelerator.unwrap_model(self.model)
        assert isinstance(module, AlignKD)
        return module

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over three groups (decoder, projector, adapters), each with its own learning rate."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.align, self._config), fused=True)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the terms; every ``grad_norm_steps`` each term's own gradient norm as well."""
        terms = model(**inputs)
        every = self._config.grad_norm_steps
        if every and self.state.global_step % every == 0:
            self._gradient_norms = gradient_norms(self.align, terms)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)).add(value.detach())
        self._counted += 1
        loss = self.align.total(terms, self._taught_share())
        return (loss, terms) if return_outputs else loss

    def _taught_share(self) -> float:
        """What is left of the distillation terms' weights at this step."""
        done = self.state.global_step / max(1, self.state.max_steps)
        return 1 + (self._config.taught_share_end - 1) * done

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean since the last entry, and gradient norms measured since then."""
        if "loss" in logs:
            logs |= {f"term/{name}": (total / self._counted).item() for name, total in self._sums.items()}
            logs |= {f"gradient_norm/{name}": norm for name, norm in self._gradient_norms.items()}
            self._sums, self._counted, self._gradient_norms = {}, 0, {}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return LengthGroupedOrder(self._dataset.text_lengths(), self.args.train_batch_size, self._config.seed)


def term_settings(config: DistillConfig) -> TermSettings:
    """The part of the settings that the loss terms are computed with."""
    return TermSettings(
        temperature=config.temperature,
        mask=config.mask,
        label_smoothing=config.label_smoothing,
        top_k=config.top_k,
        attention_by_mass=config.attention_by_mass,
    )


def parameter_groups(module: AlignKD, config: DistillConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group."""
    rates = {
        "decoder": config.learning_rate,
        "projector": config.projector_learning_rate or config.learning_rate,
        "adapters": config.adapter_learning_rate,
    }
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            owner = "projector" if name.startswith("student.projector.") else "decoder"
            groups[owner if name.startswith("student.") else "adapters"].append(parameter)
    return [
        {"name": name, "params": groups[name], "lr": rate, "weight_decay": config.weight_decay}
        for name, rate in rates.items()
        if groups[name]
    ]


def gradient_norms(module: AlignKD, terms: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of each weighted term's own gradient into the student; an inert term shows as 0."""
    parameters = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
    norms = {}
    for name, value in terms.items():
        weighted = module.weights[name] * value
        found = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.detach().float().square().sum() for gradient in found if gradient is not None]
        norms[name] = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    return norms


def _arguments(config: DistillConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(config.work),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a broken run must show, not be averaged away
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=True,  # a batch without images leaves projector and adapters without a gradient
    )


def _open_teacher(
    config: DistillConfig, student: MobileVlm, processing: Processing, console: Console
) -> MobileVlm | None:
    if not config.needs_teacher or config.teacher is None:
        if config.teacher is not None:
            console.print(f"teacher {config.teacher} is not opened: no loss term with a weight needs it")
        return None
    teacher, theirs = load_vlm(config.teacher), read_processing(config.teacher)
    sizes = (student.config.text_config.vocab_size, teacher.config.text_config.vocab_size)
    if sizes[0] != sizes[1] or sha256_of(processing.tokenizer_path) != sha256_of(theirs.tokenizer_path):
        raise UsageError(
            f"student {config.student} and teacher {config.teacher} have different vocabularies ({sizes[0]} and "
            f"{sizes[1]} tokens, different tokenizer.model); distillation needs one vocabulary: choose another "
            "student, or train it without a teacher: --losses ce"
        )
    if processing.image != theirs.image or student.config.visual_tokens != teacher.config.visual_tokens:
        raise UsageError(
            f"student {config.student} and teacher {config.teacher} see images differently "
            f"({processing.image.size} px {processing.image.strategy}, {student.config.visual_tokens} visual tokens; "
            f"{theirs.image.size} px {theirs.image.strategy}, {teacher.config.visual_tokens}); "
            "choose a pair that agrees"
        )
    console.print(f"teacher {config.teacher}: {sum(p.numel() for p in teacher.parameters()):,} parameters, frozen")
    return teacher


def _finish(trainer: DistillTrainer, config: DistillConfig, processing: Processing, rows: int, seconds: float) -> None:
    """Build the checkpoint inside the work folder, rename it to the output, and drop the rest."""
    module, history = trainer.align, trainer.state.log_history
    facts = RunFacts(
        steps=trainer.state.global_step,
        rows=rows,
        data_sha256=sha256_of(config.data),
        seconds=seconds,
        parameters=sum(p.numel() for p in module.student.parameters()),
        trainable=sum(p.numel() for p in module.student.parameters() if p.requires_grad),
        terms=_last(history, "term/"),
        gradient_norms=_last(history, "gradient_norm/"),
    )
    final = config.work / "final"
    shutil.rmtree(final, ignore_errors=True)
    save_checkpoint(module.student, final, processing, render_card(config, facts))
    if adapters := module.adapter_state():
        save_file({name: value.contiguous() for name, value in adapters.items()}, final / "adapters.safetensors")
    log = {"settings": settings_of(config), "facts": asdict(facts), "log": history}
    write_text_whole(final / "training_log.json", json.dumps(log, indent=1) + "\n")
    if (events := config.work / "tensorboard").is_dir():
        shutil.move(events, final / "tensorboard")
    refuse_existing(config.output)
    os.rename(final, config.output)
    shutil.rmtree(config.work)


def _last(history: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """Values of the latest log entry that has names with ``prefix``."""
    found = [{key: value for key, value in entry.items() if key.startswith(prefix)} for entry in history]
    latest = next((entry for entry in reversed(found) if entry), {})
    return {key.removeprefix(prefix): value for key, value in latest.items()}
