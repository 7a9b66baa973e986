"""A student's decoder -> the same with peft's low-rank updates; merged again for the checkpoint, and kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from bundle.errors import UsageError, missing_extra
from distill.models.mobilevlm import MobileVlm
from distill.settings.training import LoraSettings

if TYPE_CHECKING:
    from peft import LoraModel

NAME = "default"
FOLDER = "lora"  # in a checkpoint: the updates as peft saves them


def add_lora(student: MobileVlm, settings: LoraSettings) -> LoraModel:
    """Put updates on the decoder's linears and freeze everything else of it, embedding and lm_head included.

    Raises:
        UsageError: peft is missing, or no layer has one of the target names.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise missing_extra("peft", "distill") from error
    decoder = student.language_model
    found = {name.rsplit(".", 1)[-1] for name, _ in decoder.named_modules()}
    missing = [target for target in settings.targets if target not in found]
    if missing or not settings.targets:
        linears = sorted({name.rsplit(".", 1)[-1] for name, _ in decoder.named_modules() if name.endswith("_proj")})
        raise UsageError(f"--lora.targets {', '.join(missing)}: no such layer; the decoder has {', '.join(linears)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    tuner = LoraModel(decoder, {NAME: config}, NAME)
    student.lm_head.requires_grad_(False)
    return tuner


def save_lora(tuner: LoraModel, folder: Path) -> None:
    """Write the updates as peft does: PeftModel.from_pretrained(vlm.language_model, folder) puts them back on."""
    folder.mkdir()
    tuner.peft_config[NAME].save_pretrained(str(folder))
    updates = {
        f"base_model.{name.replace(f'.{NAME}.', '.')}": value.detach().contiguous()
        for name, value in tuner.state_dict().items()
        if ".lora_" in name
    }
    save_file(updates, folder / "adapter_model.safetensors", metadata={"format": "pt"})
