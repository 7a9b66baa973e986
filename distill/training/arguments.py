"""DistillConfig -> the settings of transformers.Trainer; making them joins the processes that a launcher prepared."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from distill.settings.training import DistillConfig

SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}
PROJECT = "alignkd"  # of the trackers that sort runs by project


def training_arguments(config: DistillConfig) -> TrainingArguments:
    """The Trainer's settings; making them joins the process group that a launcher prepared."""
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
        log_level="error",
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a broken run must show, not be averaged away
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        eval_strategy="steps" if config.eval_data else "no",
        eval_steps=config.eval_steps,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        project=PROJECT,
        run_name=config.output.name,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # AlignKD keeps every trainable parameter in the graph of every batch
    )
