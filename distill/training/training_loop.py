"""AlignKD + settings -> transformers.Trainer that logs its terms, counts over all processes, and can be resumed."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from distill.align_kd.module import AlignKD
from distill.align_kd.term_counts import term_counts
from distill.batches.batch_order import LengthGroupedOrder
from distill.batches.collator import BAD_ROWS, Collator
from distill.batches.dataset import LlavaDataset
from distill.evaluation.held_out import HeldOut, Tally
from distill.settings.training import DistillConfig
from distill.training.bad_images import BadImages
from distill.training.fsdp_units import shard_layer_by_layer
from distill.training.parameter_groups import parameter_groups
from distill.training.ranks import Ranks
from distill.training.term_meter import TermMeter, gradient_norms

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
Counts = dict[str, torch.Tensor]


class DistillTrainer(Trainer):
    """transformers.Trainer over AlignKD: its terms, their gradient norms, its parameter groups and its batch order."""

    loss_is_scaled_for_ga = True  # by the counts of the whole step, see ``compute_loss``

    def __init__(
        self,
        module: AlignKD,
        config: DistillConfig,
        args: TrainingArguments,
        ranks: Ranks,
        dataset: LlavaDataset,
        collator: Collator,
        held_out: HeldOut | None,
        bad_images: BadImages,
        callbacks: list[TrainerCallback],
    ) -> None:
        self._config, self._dataset, self._ranks, self._held_out = config, dataset, ranks, held_out
        self._align, self._meter, self._bad_images = module, TermMeter(ranks.count), bad_images
        super().__init__(
            model=module,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,  # the Trainer asks only that there is one
            data_collator=collator,
            callbacks=[StepEnd(self._meter, held_out is not None), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        self.measures_gradients = config.grad_norm_steps > 0 and self.accelerator.distributed_type not in SHARDED
        if self.accelerator.distributed_type == DistributedType.FSDP:
            shard_layer_by_layer(self.accelerator.state.fsdp_plugin, module)

    @property
    def align(self) -> AlignKD:
        """The module without what accelerate wraps around it."""
        return self._align

    @property
    def held_out_rows(self) -> int:
        """Conversations that are asked and not trained on."""
        return 0 if self._held_out is None else len(self._held_out)

    @property
    def engine(self) -> str:
        """How many processes, what shares their work, and the precision, for the model card."""
        kind, precision = self.accelerator.distributed_type.value, self.accelerator.mixed_precision
        processes = "1 process" if self._ranks.count == 1 else f"{self._ranks.count} processes by {kind}"
        return f"{processes}, {'float32' if precision == 'no' else precision}"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over three groups (decoder, projector, adapters), each with its own learning rate."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.align, self._config), fused=True)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro batches of one step, and over how many items each term runs in all of them and in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = [self._counts(batch) for batch in batches]
        names = list(self.align.weights)
        total = torch.stack([torch.stack([one[name] for one in counted]).sum() for name in names]).to(device)
        if self._ranks.count > 1:
            dist.all_reduce(total)
        return batches, dict(zip(names, total.unbind(), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Weighted sum of the terms, each a mean over the step's items in all micro batches and all processes.

        ``num_items_in_batch`` holds the step's counts. Engines average gradients over processes, which is undone here.

        Raises:
            BadImageError: the batch lacks a row whose image could not be read, and such rows stop the run.
        """
        bad_rows = inputs.pop(BAD_ROWS, None)
        if bad_rows is not None:
            self._bad_images.meet(bad_rows.tolist(), self.state.global_step)
        self.align.taught_share = self._taught_share()
        if "recorded" in inputs:  # FSDP2 would round a dict's tensors to its parameters' dtype; this it passes on
            inputs["recorded"] = MappingProxyType(inputs["recorded"])
        terms = model(**inputs)
        every = self._config.grad_norm_steps
        if self.measures_gradients and self.state.global_step % every == 0:
            self._meter.measured(gradient_norms(self.align, terms))
        here, everywhere = self._counts(inputs), num_items_in_batch
        shares = {
            name: value * (here[name] / everywhere[name].clamp_min(1)).to(value.dtype) for name, value in terms.items()
        }
        parts = self.current_gradient_accumulation_steps * self._ranks.count
        loss = self.align.total(shares, self._taught_share(), parts)
        self._meter.add(shares | {"loss": loss})
        loss = loss * self._ranks.count
        return (loss, terms) if return_outputs else loss

    def _taught_share(self) -> float:
        """What is left of the distillation terms' weights at this step."""
        done = self.state.global_step / max(1, self.state.max_steps)
        return 1 + (self._config.taught_share_end - 1) * done

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's loss by the terms' means over processes since the last entry and their weighted sum."""
        if "loss" in logs:
            logs |= self._meter.take()
            if self._config.on_bad_image == "skip":  # a collective: every process logs at the same steps
                count = torch.tensor([self._bad_images.count], device=self.args.device)
                logs["rows_left_out"] = int(self.accelerator.gather(count).sum())
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the accuracy on the held-out rows, each process asking its part of them."""
        assert self._held_out is not None
        student, sharded = self.align.student, self.model if isinstance(self.model, FSDPModule) else None
        student.eval()
        if sharded is not None:
            sharded.unshard()  # what no inner module gathers by itself: embedding, first layer, lm_head
        with self.accelerator.autocast():
            tally = self._held_out.tally(student, self.args.device, self._ranks.index, self._ranks.count)
        if sharded is not None:
            sharded.reshard()
        accuracy = {f"accuracy/{family}": value for family, value in self._summed(tally).percent().items()}
        self.log(dict(accuracy))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, accuracy)
        return accuracy

    def _summed(self, tally: Tally) -> Tally:
        if self._ranks.count == 1:
            return tally
        both = torch.tensor([list(tally.asked.values()), list(tally.right.values())], device=self.args.device)
        dist.all_reduce(both)
        asked, right = both.tolist()
        return Tally(dict(zip(tally.asked, asked, strict=True)), dict(zip(tally.right, right, strict=True)))

    def _counts(self, batch: dict[str, torch.Tensor]) -> Counts:
        return term_counts(
            self.align,
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        lengths, size = self._dataset.text_lengths(), self.args.train_batch_size
        self._order = LengthGroupedOrder(lengths, size, self._config.seed, self.args.world_size)
        return self._order

    def _run_epoch(self, model: Any, epoch: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer does not reach our sampler through what accelerate wraps around it in a resumed epoch."""
        self._order.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also what the log has summed; the Trainer's state, which marks a whole checkpoint, is written after this."""
        super()._save_rng_state(output_dir)
        self._meter.save(Path(output_dir), self._ranks.main)
        self._ranks.wait()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._meter.load(Path(checkpoint), self.args.device, self._ranks.main)


class StepEnd(TrainerCallback):
    """Counts the steps of a log entry, and asks for an evaluation at the last step."""

    def __init__(self, meter: TermMeter, evaluates: bool) -> None:
        self._meter, self._evaluates = meter, evaluates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.step_ended()
        if self._evaluates and state.global_step >= state.max_steps:
            control.should_evaluate = True
