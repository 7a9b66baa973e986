"""Low-rank training: what is trained, that gradients reach it, and that the checkpoint holds the merged decoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bundle.errors import UsageError
from distill.align_kd.module import AlignKD
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.settings.training import DistillConfig, LoraSettings
from distill.training.lora import add_lora
from distill.training.parameter_groups import parameter_groups
from distill.training.run import train

MakeData = Callable[..., Path]


def test_every_trained_parameter_is_in_one_group_and_gets_a_gradient(
    student: MobileVlm, teacher: MobileVlm, mixed: dict[str, torch.Tensor], reference: Path
) -> None:
    config = DistillConfig(student=reference, teacher=reference, data=reference, output=reference / "x")
    module = AlignKD(student, teacher, config.term_weights)
    add_lora(student, LoraSettings(rank=4))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decoder = {name for name in trained if name.startswith("student.language_model.")}
    assert decoder and all(".lora_" in name for name in decoder) and len(decoder) == 2 * 7 * 2
    others = trained.keys() - decoder
    assert all(name.startswith(("student.projector.", "head_map.", "visual_map.")) for name in others)
    grouped = [id(p) for group in parameter_groups(module, config) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trained.values())
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:  # at zero, they would keep gradients from lora_A
            torch.nn.init.normal_(parameter)
    module.total(module(**mixed)).backward()
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_checkpoint_is_merged_and_the_updates_lie_beside(
    reference: Path, make_data: MakeData, tmp_path: Path
) -> None:
    config = DistillConfig(
        student=reference / "student", teacher=reference / "teacher", data=make_data(), output=tmp_path / "new",
        lora=LoraSettings(rank=4, targets=("q_proj", "up_proj")), max_steps=4, batch_size=3, learning_rate=1e-2,
        report="none", gradient_checkpointing=True,
    )  # fmt: skip
    merged, before = load_vlm(train(config)), load_vlm(config.student)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    layers = {name for name in changed if "language_model" in name}
    assert layers and all(name.endswith(("q_proj.weight", "up_proj.weight")) for name in layers)
    assert changed - layers and all(name.startswith("projector.") for name in changed - layers)
    assert "--lora.rank 4 --lora.targets q_proj up_proj" in (config.output / "README.md").read_text()
    decoder = PeftModel.from_pretrained(before.language_model, str(config.output / "lora"))
    embeds = torch.randn(1, 7, 64)
    with torch.no_grad():
        one = decoder(inputs_embeds=embeds).last_hidden_state
        two = merged.language_model(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    stored = load_file(config.output / "lora" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 2


def test_unknown_targets_are_named(student: MobileVlm) -> None:
    with pytest.raises(UsageError, match=r"--lora.targets wrong: no such layer; the decoder has down_proj, gate_proj"):
        add_lora(student, LoraSettings(rank=2, targets=("q_proj", "wrong")))


def test_gradient_checkpointing_changes_no_loss(reference: Path, make_data: MakeData, tmp_path: Path) -> None:
    plain = DistillConfig(
        student=reference / "student", teacher=reference / "teacher", data=make_data(), output=tmp_path / "plain",
        max_steps=4, batch_size=3, learning_rate=1e-3, report="none",
    )  # fmt: skip
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    values = []
    for output, checkpointing in ((plain.output, False), (tmp_path / "again", True)):
        from dataclasses import replace

        train(replace(plain, output=output, gradient_checkpointing=checkpointing))
        values.append(load_file(output / "model.safetensors"))
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, atol=1e-6, rtol=1e-5)


def test_checkpointing_reaches_the_decoder(
    student: MobileVlm, teacher: MobileVlm, mixed: dict[str, torch.Tensor]
) -> None:
    """Fewer tensors are kept for the backward pass, and with the same gradients."""
    module = AlignKD(student, teacher, {"cross_entropy": 1.0, "attention": 1.0, "visual": 1.0}).train()
    kept, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        module.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.total(module(**mixed))
        kept.append(count)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    assert kept[1] < 0.6 * kept[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-4)
