"""--dry-run: its counts are those of the training it plans, and large models need no memory for it."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from distill import cli
from distill.align_kd.module import AlignKD
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.models.save import save_checkpoint
from distill.plan.memory import Decoder, Sizes, memory_per_gpu
from distill.plan.plan import make_plan, planned_steps
from distill.plan.report import plan_lines, size
from distill.settings.training import DistillConfig, LoraSettings
from distill.training.parameter_groups import parameter_groups
from distill.training.run import train

MakeData = Callable[..., Path]


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student", teacher=reference / "teacher", data=make_data(), output=tmp_path / "new",
        batch_size=2, epochs=3, gradient_accumulation=2, report="none", projector_learning_rate=1e-3,
    )  # fmt: skip


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(tensor_bytes, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize("lora", [0, 4])
def test_weights_gradients_and_optimizer_are_what_torch_allocates(
    config: DistillConfig, student: MobileVlm, teacher: MobileVlm, mixed: dict[str, torch.Tensor], lora: int
) -> None:
    config = replace(config, lora=LoraSettings(rank=lora))
    memory = make_plan(config, 1, "ddp", None).memory
    module = AlignKD(student, teacher, config.term_weights)
    if lora:
        from distill.training.lora import add_lora

        add_lora(student, config.lora)
    optimizer = torch.optim.AdamW(parameter_groups(module, config), fused=True)
    module.total(module(**mixed)).backward()
    optimizer.step()
    assert memory.weights == sum(p.nbytes for p in module.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert memory.optimizer == sum(tensor_bytes(state) for state in optimizer.state.values())
    assert memory.teacher == sum(p.nbytes for p in teacher.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_near_what_torch_keeps(bf16: bool, checkpointing: bool) -> None:
    layers, tokens = 4, 512
    sizes = Decoder(128, 320, 4, layers)
    llama = LlamaModel(
        LlamaConfig(
            hidden_size=128, intermediate_size=320, num_attention_heads=4, num_key_value_heads=4, vocab_size=32,
            num_hidden_layers=layers,
        )
    ).train()  # fmt: skip
    if checkpointing:
        llama.activation_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embeds = torch.randn(2, tokens // 2, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        llama(inputs_embeds=embeds, use_cache=False)
    copies = {shape for p in llama.parameters() for shape in (p.shape, p.shape[::-1])}  # autocast's: gathered weights
    kept = sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in weights and t.shape not in copies)
    planned = memory_per_gpu(Sizes(0, 0, 0, 0, 0, 0, sizes, None, tokens, 0), "ddp", 1, bf16, checkpointing).activations
    if checkpointing:  # what the forward pass keeps; the one layer that is computed again comes on top
        planned -= tokens * sizes.layer_bytes(bf16)
    assert planned == pytest.approx(kept, rel=0.1 if not checkpointing else 0.35)


def test_steps_and_groups_are_those_of_the_run(config: DistillConfig) -> None:
    plan = make_plan(config, 1, "ddp", 1800.0)
    log = json.loads((train(config) / "training_log.json").read_text())
    assert plan.steps == log["facts"]["steps"] and plan.hours == plan.steps / 2
    assert plan.rows_per_step == log["facts"]["rows_per_step"] == 4
    assert (
        sum(one.count for one in plan.trained if not one.name.startswith(("head_map", "visual_map")))
        == (log["facts"]["trainable"])
    )
    rates = {one.group: one.learning_rate for one in plan.trained}
    assert rates == {"decoder": 4e-5, "projector": 1e-3, "adapters": 1e-3}
    assert plan.features_kept and plan.features_bytes == 4 * 24 * 24 * 32 * 4


def test_engines_share_what_they_shard(config: DistillConfig) -> None:
    one = make_plan(config, 1, "ddp", None).memory
    for engine in ("ddp", "zero2", "zero3", "fsdp2"):
        eight = make_plan(config, 8, engine, None).memory  # type: ignore[arg-type]
        sharded = engine != "ddp", engine in ("zero3", "fsdp2")
        assert eight.optimizer == pytest.approx(one.optimizer / (8 if sharded[0] else 1), abs=8)
        assert eight.weights == pytest.approx(one.weights / (8 if sharded[1] else 1), abs=8)
        assert eight.teacher == one.teacher  # a whole copy in every process
    assert planned_steps(config, 1000, 8) == (31, 93)
    offloaded = replace(config, teacher_placement="cpu")
    assert make_plan(offloaded, 1, "ddp", None).memory.teacher < 0.3 * one.teacher
    assert make_plan(replace(config, teacher_bits="4"), 1, "ddp", None).memory.teacher < one.teacher


def test_the_command_prints_it_and_trains_nothing(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--student", config.student, "--teacher", config.teacher, "--data", config.data, "--output", config.output,
        "--dry-run", "--gpus", 8, "--engine", "fsdp2", "--step-time-s", 3, "--json", "--lora.rank", 2,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["alignkd-distill", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr().out.splitlines()
    assert not left.value.code and not config.output.exists() and not config.work.exists()
    assert any("layers.*.self_attn.q_proj.lora_A.default.weight" in line for line in out)
    values = json.loads(out[-1])
    assert values["gpus"] == 8 and values["memory_bytes"]["total"] > 0 and len(values["trained"]) > 30
    assert len(plan_lines(make_plan(config, 1, "ddp", None), config, True)) > 40


def test_a_teacher_of_7b_takes_no_memory_to_plan(config: DistillConfig, tmp_path: Path, reference: Path) -> None:
    """Files of the right length and no content: 13.5 GB that nobody reads."""
    folder = tmp_path / "large"
    like = load_vlm(reference / "teacher")
    save_checkpoint(like, folder, read_processing(reference / "teacher"))
    text = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "head_dim": 128,
    }  # fmt: skip
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = MobileVlm(type(like.config).from_dict(raw)).state_dict()
    write_sparse(shapes, folder / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan(replace(config, teacher=folder, teacher_dtype="bfloat16"), 8, "fsdp2", None)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert 6.4e9 < plan.teacher_parameters < 6.6e9
    assert plan.memory.teacher == 2 * plan.teacher_parameters
    assert grown < 1 << 30


def write_sparse(shapes: dict[str, torch.Tensor], file: Path) -> None:
    header, at = {}, 0
    for name, tensor in shapes.items():
        length = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def test_sizes_are_readable() -> None:
    assert [size(n) for n in (512, 2048, 3 << 30)] == ["512 B", "2.00 KiB", "3.00 GiB"]
