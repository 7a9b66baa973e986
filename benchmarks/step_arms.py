"""Shape, batch size, device, arithmetic -> the arms to compare: name -> a function that returns one step's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from published_step import TOP_K, published_loss
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from distill.align_kd.module import AlignKD
from distill.losses.divergences import log_probabilities
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.roles import look, predicting_rows
from distill.settings.terms import PRESETS, TermSettings
from distill.teacher.view import TeacherView, WholeSides, live_view

VOCABULARY, BEFORE_IMAGE, QUESTION, ANSWER = 32_000, 36, 34, 86  # with 144 visual tokens: L = 300, 86 supervised
POSITIONS = BEFORE_IMAGE + 144 + QUESTION + ANSWER
PUBLISHED, OURS, FROM_CACHE = "published", "alignkd, bf16 teacher", "alignkd, teacher and features recorded"
Batch = dict[str, torch.Tensor]
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    """Sizes of a LLaMA decoder."""

    width: int
    layers: int
    heads: int
    intermediate: int


SHAPES = {  # name -> teacher, student, (tower's width, layers, heads)
    "tiny": (Decoder(64, 3, 4, 96), Decoder(32, 2, 2, 48), (32, 2, 2)),  # for tests
    "small": (Decoder(1024, 10, 16, 2816), Decoder(512, 8, 8, 1408), (384, 12, 6)),
    "1.7B": (Decoder(4096, 32, 32, 11008), Decoder(2048, 24, 16, 5632), (1024, 24, 16)),
}


@dataclass(frozen=True)
class Arms:
    """The steps, the models they share, and the terms of the ones that differ in arithmetic.

    Attributes:
        modules: for clearing gradients.
        steps: name -> one step's loss.
        terms: name -> a function that returns the terms of that arm.
    """

    modules: tuple[AlignKD, ...]
    steps: dict[str, Step]
    terms: dict[str, Callable[[], dict[str, torch.Tensor]]]

    def clear(self) -> None:
        """Drop all gradients."""
        for module in self.modules:
            module.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, once."""
        every = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        return list(every.values())


@dataclass(frozen=True)
class KnownRows:
    """A teacher's whole distributions, computed before."""

    log_teacher: torch.Tensor  # [S, V]

    def split(self, rows: int) -> list[KnownRows]:
        return [KnownRows(part) for part in self.log_teacher.split(rows)]

    def beside(self, log_student: torch.Tensor) -> WholeSides:
        return WholeSides(log_student, self.log_teacher)


def make_arms(shape: str, batch_size: int, device: str, autocast: bool, seed: int = 0) -> Arms:
    """All arms on one student and one batch.

    Args:
        shape: a name of SHAPES.
        device: "cpu" or "cuda".
        autocast: every arm's arithmetic in bfloat16 (weights and gradients of the student stay float32) and no arm with
            a float32 teacher; else float32, and one arm with autocast.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        teacher, student = make_pair(shape)
        batch = make_batch(batch_size)
    low = nn.Module.to(copy.deepcopy(teacher) if not autocast else teacher, dtype=torch.bfloat16)
    settings = TermSettings(top_k=TOP_K)
    ours = AlignKD(student, low, PRESETS["paper"], settings).to(device)
    assert ours.shares_tower

    def cast(step: Callable[[], torch.Tensor]) -> Step:
        def run() -> torch.Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return step()

        return run

    known, view = recorded(ours, batch)
    exact = None if autocast else AlignKD(student, teacher, PRESETS["paper"], settings).to(device)
    steps: dict[str, Step] = {}
    terms = {OURS: lambda: ours(**batch)}
    if exact is not None:
        steps |= {PUBLISHED: lambda: published_loss(exact, batch), "alignkd": lambda: exact.total(exact(**batch))}
        terms = {"alignkd": lambda: exact(**batch)} | terms
    steps |= {
        PUBLISHED if exact is None else "published, bf16 teacher": lambda: published_loss(ours, batch),
        OURS: lambda: ours.total(ours(**batch)),
        "alignkd, bf16 teacher, features known": lambda: ours.total(ours(**known)),
        "alignkd, teacher recorded": lambda: ours.total(from_view(ours, batch, view)),
        FROM_CACHE: lambda: ours.total(from_view(ours, known, view)),
    }
    if autocast:
        steps = {name: cast(step) for name, step in steps.items()}
    else:
        steps["alignkd, bf16 teacher, bf16 autocast"] = cast(steps[OURS])
    modules = (ours,) if exact is None else (ours, exact)
    return Arms(modules, steps, terms)


def make_pair(shape: str) -> tuple[MobileVlm, MobileVlm]:
    """Random teacher and student of these sizes with one tower between them, on the current default device."""
    teacher_size, student_size, (width, layers, heads) = SHAPES[shape]
    vision = CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=336,
        patch_size=14,
    )
    teacher, student = (
        MobileVlm(
            MobileVlmConfig(
                LlamaConfig(
                    hidden_size=size.width,
                    num_hidden_layers=size.layers,
                    num_attention_heads=size.heads,
                    num_key_value_heads=size.heads,
                    intermediate_size=size.intermediate,
                    vocab_size=VOCABULARY,
                    max_position_embeddings=2048,
                ),
                vision,
            )
        )
        for size in (teacher_size, student_size)
    )
    student.vision_tower.load_state_dict(teacher.vision_tower.state_dict())
    return teacher, student


def make_batch(size: int) -> Batch:
    """Random conversations in the order of the v1 template: system text, image, question, answer."""
    ids = torch.randint(3, VOCABULARY, (size, BEFORE_IMAGE + 1 + QUESTION + ANSWER))
    ids[:, BEFORE_IMAGE] = MobileVlmConfig().image_token_id
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(size, 3, 336, 336),
    }


@torch.no_grad()
def recorded(module: AlignKD, batch: Batch) -> tuple[Batch, TeacherView]:
    """The batch with the tower's features instead of pixels, and all that its teacher says to it."""
    teacher, wanted = module.teacher, module.wanted
    assert teacher is not None and wanted.rows is not None
    features = module.student.tower_features(batch["pixel_values"])  # [n, P, D_v]
    known = {name: value for name, value in batch.items() if name != "pixel_values"}
    tokens = teacher.projector(features.to(teacher.dtype))  # [n, N, D_T]
    seen = look(teacher, known["input_ids"], known["attention_mask"], known["labels"], tokens, mask=wanted.rows)
    hidden = predicting_rows(seen, wanted.rows)[0]  # [S, D_T]
    rows = KnownRows(log_probabilities(teacher.lm_head(hidden), wanted.temperature))
    return known | {"image_features": features}, replace(live_view(teacher, seen, wanted), rows=rows)


def from_view(module: AlignKD, batch: Batch, view: TeacherView) -> dict[str, torch.Tensor]:
    """The terms where the teacher's side is known."""
    student = module.student
    features = batch["image_features"] if "image_features" in batch else None
    if features is None:
        with torch.no_grad():
            features = student.tower_features(batch["pixel_values"])  # [n, P, D_v]
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    return module.compare(look(student, ids, mask, labels, student.projector(features), mask="answer"), view)


def term_differences(arms: Arms) -> dict[str, float]:
    """Term -> by how much, relatively, the bf16 teacher's differs from the float32 teacher's."""
    if "alignkd" not in arms.terms:
        return {}
    with torch.no_grad():
        exact, low = arms.terms["alignkd"](), arms.terms[OURS]()
    return {name: (abs(low[name] - exact[name]) / abs(exact[name])).item() for name in exact}
