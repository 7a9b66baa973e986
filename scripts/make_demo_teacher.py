"""Nothing -> the demo teacher: tokenizer, pretrained tower, decoder trained in five stages; its accuracy beside it.

    OMP_NUM_THREADS=1 python scripts/make_demo_teacher.py --output distill/demo_teacher

What is in ``--work`` already is kept, so a broken-off run goes on with its last whole stage. Every stage is seeded; on
the same type of machine the weights come out the same. Last line: accuracy per task family as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, Trainer, TrainingArguments

from bundle.manifest import TokenizerSpec
from bundle.prompt import TEMPLATES
from bundle.staging import write_text_whole
from bundle.tokenizer import open_tokenizer
from distill.align_kd.module import AlignKD
from distill.batches.batch_order import LengthGroupedOrder
from distill.batches.collator import Collator
from distill.batches.dataset import LlavaDataset
from distill.batches.image_store import ImageStore
from distill.data.rows import read_rows
from distill.demo_world.demo_benchmarks import TURNS, Row, held_out_rows, training_rows, turns
from distill.demo_world.files import save_image
from distill.demo_world.lessons import FAMILY_WEIGHTS, conversation, drill, text_conversation
from distill.demo_world.open_questions import describe
from distill.demo_world.question import Question
from distill.demo_world.scene import PAIRS, Scene, draw, make_scene
from distill.demo_world.tokenizer import train_tokenizer
from distill.demo_world.tower import IMAGE, SELECTED_LAYER, pretrain_tower
from distill.evaluation.family_accuracy import family_accuracy
from distill.models import load_vlm
from distill.models.create import create_student
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.processing import Processing, read_processing
from distill.models.save import save_checkpoint
from distill.training.features import known_features

CONTEXT = 512
# 1/sqrt(width): with LLaMA's 0.02 a decoder this narrow starts so flat that it sits on the language prior
INIT_STD = 0.09
EMBEDDING_GAIN = 5.0  # text embeddings start as large as the visual tokens
TOWER_SCENES, TOWER_STEPS, TOWER_BATCH, TOWER_LEARNING_RATE = 20_000, 1800, 64, 1.5e-3
# Muon on the matrices reaches the same loss with less than half of AdamW's questions (drill to 0.26: 67k against 157k)
MATRIX_LEARNING_RATE, OTHER_LEARNING_RATE = 3e-3, 1.5e-3
STUDENT = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 192}
DRILL_TURNS = 14
TEST_PER_FAMILY = 1000
FEATURE_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Stage:
    """A stage of the decoder's training: ``scenes`` pictures, ``steps`` of ``batch_size`` conversations."""

    scenes: int
    steps: int
    batch_size: int
    rate: float = 1.0  # share of the learning rates


STAGES = {
    "describe": Stage(5_000, 400, 16),  # every cell is read out, as in the captions of LLaVA's first stage
    "drill": Stage(10_000, 2500, 16),  # terse questions: looking up what is asked for
    "instruct": Stage(16_000, 6000, 16),  # the mix of the demo's training file, with the benchmarks' wordings
    "finish": Stage(12_000, 3000, 16),  # the benchmarks' wordings, the hard families more often
    "choice": Stage(12_000, 1500, 16, 0.5),  # more than half of it lettered choices
}
FINISH_WEIGHTS = FAMILY_WEIGHTS | {"choice": 8.0, "where": 2.0, "count": 4.0, "count_check": 3.0, "existence": 2.0}
CHOICE_WEIGHTS = FINISH_WEIGHTS | {"choice": 26.0}
FINISH_TURNS, FINISH_TEXT_SHARE = 8, 0.04


def main() -> None:
    """Run every step whose result is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("distill/demo_teacher"), help="replaced when all is done")
    parser.add_argument("--student", type=Path, help="also write a small student, pretrained on the first two stages")
    parser.add_argument("--teacher", type=Path, help="take this finished teacher and make only its student")
    parser.add_argument("--work", type=Path, default=Path("demo_teacher.work"), help="finished stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="part of all scenes and steps, for a trial run")
    flags = parser.parse_args()
    if flags.teacher is None:
        make_teacher(flags.output, flags.work, flags.seed, flags.share)
    if flags.student is not None:
        make_student(flags.teacher or flags.output, flags.student, flags.work, flags.seed, flags.share)


def make_teacher(output: Path, work: Path, seed: int, share: float) -> None:
    """All stages, then the accuracy on new pictures."""
    begun = time.monotonic()
    checkpoint = make_start(work, seed, share)
    for name in STAGES:
        checkpoint = run_stage(name, checkpoint, work / name, seed, share)
    checkpoint = halve(checkpoint, work / "half")
    accuracy = measure(checkpoint, work, seed)
    publish(checkpoint, output, accuracy, seed, time.monotonic() - begun)
    sys.stdout.write(json.dumps(accuracy) + "\n")


def make_student(teacher: Path, output: Path, work: Path, seed: int, share: float) -> None:
    """A student that has had MobileVLM's first stage, descriptions and drills, and none of the demo's questions.

    From random weights a two-layer decoder sits on the language prior for longer than a demo lasts.
    """
    start = work / "student_start"
    if not start.exists():
        save_checkpoint(create_student(load_vlm(teacher), **STUDENT, seed=seed), start, read_processing(teacher))
    described = run_stage("describe", start, work / "student_describe", seed, share)
    drilled = run_stage("drill", described, work / "student_drill", seed, share)
    shutil.rmtree(output, ignore_errors=True)
    card = STUDENT_CARD.format(command=f"python scripts/make_demo_teacher.py --student {output} --seed {seed}")
    save_checkpoint(load_vlm(drilled, torch.float16), output, read_processing(drilled), card)


def halve(checkpoint: Path, output: Path) -> Path:
    """The same checkpoint with its weights in float16, in place of ``output``."""
    shutil.rmtree(output, ignore_errors=True)
    save_checkpoint(load_vlm(checkpoint, torch.float16), output, read_processing(checkpoint))
    return output


def make_start(work: Path, seed: int, share: float) -> Path:
    """Tokenizer, trained tower and a random decoder as a checkpoint."""
    folder = work / "start"
    if folder.exists():
        return folder
    tokenizer_path = work / "tokenizer.model"
    train_tokenizer(tokenizer_path, seed)
    vision = CLIPVisionConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=256,
        patch_size=16,  # 6x6 patches, 2x2 a cell
        image_size=IMAGE.size,
        hidden_act="gelu",
        projection_dim=96,
    )
    tower, accuracy = pretrain_tower(
        vision,
        work / "tower",
        pool=part(TOWER_SCENES, share),
        steps=part(TOWER_STEPS, share),
        batch_size=TOWER_BATCH,
        learning_rate=TOWER_LEARNING_RATE,
        seed=seed,
    )
    write_text_whole(work / "tower.json", json.dumps(accuracy) + "\n")
    spec = TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=1, eos_ids=(2,), pad_id=0)
    tokenizer = open_tokenizer(spec, work)
    text = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_STD,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    vlm = MobileVlm(MobileVlmConfig(text, vision, vision_select_layer=SELECTED_LAYER))
    vlm.vision_tower.load_state_dict(tower.state_dict())
    vlm.language_model.embed_tokens.weight.data.mul_(EMBEDDING_GAIN)
    save_checkpoint(vlm, folder, Processing(IMAGE, TEMPLATES["v1"], tokenizer_path, spec))
    return folder


def part(number: int, share: float) -> int:
    """That part of a number, at least one."""
    return max(1, round(number * share))


def run_stage(name: str, checkpoint: Path, output: Path, seed: int, share: float) -> Path:
    """Draw a stage's data, train on it, write ``output``, and drop the pictures again."""
    data, stage = output.with_name(f"{output.name}_data"), STAGES[name]
    if output.exists():
        return output
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    rows = STAGE_ROWS[name](data, random.Random(f"{seed} {name}"), part(stage.scenes, share))
    write_text_whole(data / "train.json", json.dumps(rows))
    vlm, processing = load_vlm(checkpoint), read_processing(checkpoint)
    teach(vlm, processing, data / "train.json", stage, part(stage.steps, share), seed)
    save_checkpoint(vlm, output, processing)
    shutil.rmtree(data)
    return output


def teach(vlm: MobileVlm, processing: Processing, data: Path, stage: Stage, steps: int, seed: int) -> None:
    """Train projector and decoder in place by cross entropy on the answers."""
    rows = read_rows(data, data.parent)
    tokenizer = open_tokenizer(processing.tokenizer, processing.tokenizer_path.parent)
    dataset = LlavaDataset(rows, processing, tokenizer, CONTEXT, vlm.config.visual_tokens)
    module = AlignKD(vlm, None, {"cross_entropy": 1.0})
    images = ImageStore(processing.image, 0)
    features = known_features(module, rows, images, FEATURE_CACHE_BYTES)
    arguments = TrainingArguments(
        output_dir=str(data.parent / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.rate,  # a share: MuonAndAdamW multiplies its two rates by it
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_grad_norm=1.0,
        seed=seed,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    collator = Collator(processing.tokenizer.pad_id, images, features)
    LessonTrainer(model=module, args=arguments, train_dataset=dataset, data_collator=collator).train()
    vlm.eval()


class LessonTrainer(Trainer):
    """transformers.Trainer with cross entropy on the answers and Muon on the matrices."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon for the matrices of decoder and projector, AdamW for embeddings, output layer, norms and biases."""
        assert self.model is not None
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        inner = {
            name for name, parameter in trained if parameter.ndim == 2 and (".layers." in name or ".projector." in name)
        }
        self.optimizer = MuonAndAdamW(
            [parameter for name, parameter in trained if name in inner],
            [parameter for name, parameter in trained if name not in inner],
            self.args.learning_rate,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The one term."""
        return model(**inputs)["cross_entropy"]

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        assert isinstance(self.train_dataset, LlavaDataset)
        return LengthGroupedOrder(self.train_dataset.text_lengths(), self.args.train_batch_size, self.args.seed)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that a learning rate schedule and a Trainer see as one; ``rate`` is a share of their rates."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], rate: float) -> None:
        inner, outer = rate * MATRIX_LEARNING_RATE, rate * OTHER_LEARNING_RATE
        self.parts = (
            torch.optim.Muon(matrices, lr=inner, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=outer, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )
        super().__init__([group for inner in self.parts for group in inner.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """Step both; the groups are theirs, so a changed learning rate reaches them."""
        for inner in self.parts:
            inner.step()


def describe_rows(folder: Path, rng: random.Random, scenes: int) -> list[Row]:
    """One description a picture."""
    return rows_of(folder, rng, scenes, lambda scene: [describe(scene, rng)])


def drill_rows(folder: Path, rng: random.Random, scenes: int) -> list[Row]:
    """Terse questions on a picture, a description after a third of them."""

    def ask(scene: Scene) -> list[Question]:
        described = [describe(scene, rng)] if rng.random() < 0.3 else []
        return drill(scene, rng, DRILL_TURNS) + described

    return rows_of(folder, rng, scenes, ask)


def finish_rows(folder: Path, rng: random.Random, scenes: int, weights: dict[str, float] = FINISH_WEIGHTS) -> list[Row]:
    """Conversations in the benchmarks' wordings, and a few without an image."""
    text = round(scenes * FINISH_TEXT_SHARE)
    rows = rows_of(folder, rng, scenes - text, lambda scene: conversation(scene, rng, FINISH_TURNS, weights))
    return rows + [
        {"id": f"text_{number:06d}", "conversations": turns(text_conversation(rng, TURNS), False)}
        for number in range(text)
    ]


def rows_of(folder: Path, rng: random.Random, scenes: int, ask: Callable[[Scene], list[Question]]) -> list[Row]:
    """Pictures of the whole world, UNSEEN_PAIRS too, with what ``ask`` asks of them."""
    rows: list[Row] = []
    for number in range(scenes):
        scene, image = make_scene(rng, PAIRS), f"images/{number:06d}.jpg"
        save_image(folder / image, draw(scene, rng))
        rows.append({"id": str(number), "image": image, "conversations": turns(ask(scene), True)})
    return rows


STAGE_ROWS: dict[str, Callable[[Path, random.Random, int], list[Row]]] = {
    "describe": describe_rows,
    "drill": drill_rows,
    "instruct": lambda folder, rng, scenes: training_rows(folder, rng, scenes, PAIRS),
    "finish": finish_rows,
    "choice": partial(finish_rows, weights=CHOICE_WEIGHTS),
}


def measure(checkpoint: Path, work: Path, seed: int) -> dict[str, float]:
    """Percent right per family on new pictures."""
    folder = work / "test"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = held_out_rows(folder, "test", random.Random(f"{seed} teacher test"), TEST_PER_FAMILY)
    write_text_whole(folder / "test.json", json.dumps(rows))
    processing = read_processing(checkpoint)
    tokenizer = open_tokenizer(processing.tokenizer, checkpoint)
    return family_accuracy(load_vlm(checkpoint), processing, tokenizer, folder / "test.json")


def publish(checkpoint: Path, output: Path, accuracy: dict[str, float], seed: int, seconds: float) -> None:
    """Write weights, tokenizer, card and accuracy.json to ``output``."""
    shutil.rmtree(output, ignore_errors=True)
    lines = "\n".join(f"| {family} | {value:.1f} |" for family, value in accuracy.items())
    command = f"python scripts/make_demo_teacher.py --seed {seed}"
    card = CARD.format(command=command, per_family=TEST_PER_FAMILY, lines=lines)
    save_checkpoint(load_vlm(checkpoint, torch.float16), output, read_processing(checkpoint), card)
    facts = {"command": command, "seed": seed, "seconds": round(seconds), "torch": torch.__version__}
    facts |= {"questions_per_family": TEST_PER_FAMILY, "percent_right": accuracy}
    write_text_whole(output / "accuracy.json", json.dumps(facts, indent=1) + "\n")


CARD = """---
library_name: alignkd
pipeline_tag: image-text-to-text
---

# Demo teacher

A MobileVLM V2 of 1.3 million parameters that knows the demo world (`alignkd-data make-demo`) and nothing else. Made by

    {command}

from nothing: a tower pretrained on what every cell of a picture holds, then the decoder on descriptions, on terse
questions, on the mix of the demo's training file, and on what was still hard after it. It has seen every colour-shape
pair; the training file of the demo leaves four out.

Percent of right answers on new pictures, {per_family} questions a family:

| family | % |
|---|---|
{lines}
"""

STUDENT_CARD = """---
library_name: alignkd
pipeline_tag: image-text-to-text
---

# Demo student, before distillation

Two layers, 64 wide, with the demo teacher's vision tower and tokenizer. Made by

    {command}

It has read descriptions of scenes and terse questions about them, as MobileVLM's first stage reads captions, and none
of the questions that the demo trains and tests: it answers hardly any of those before training.
"""


if __name__ == "__main__":
    main()
