"""Model and conversations -> what each part loses at 4 and at 8 bits, everything else left in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bundle.manifest import Frozen
from export.job.meter import Meter
from export.model.streamed import LoadedModel
from export.quantize.calibration import Conversation
from export.quantize.parts import GROUP_SIZE, Part
from export.quantize.passes import answer_logits, decoder_inputs, through_layer
from export.weights.dequantized import rounded
from export.weights.lazy import LazyWeights
from export.weights.recipe import Bits, Storage

WIDTHS: dict[Bits, Storage] = {4: Storage(4, GROUP_SIZE), 8: Storage(8, None)}


class Loss(Frozen):
    """How far the answers are from the float model's, which is fed the same tokens.

    Attributes:
        kl: Kullback-Leibler divergence from the float model's distribution, mean of all answer tokens, in nats.
        flips_percent: share of the answers of which some token is no longer the most probable one that it was.
    """

    kl: float
    flips_percent: float


class RoundedPart(LazyWeights):
    """The weights of a few names, rounded to nearest."""

    def __init__(self, weights: Mapping[str, torch.Tensor], storages: Mapping[str, Storage]) -> None:
        self._weights, self._storages = weights, storages

    def __getitem__(self, name: str) -> torch.Tensor:
        return rounded(self._weights[name].float(), self._storages[name])

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._storages)

    def __len__(self) -> int:
        return len(self._storages)


class Sensitivity:
    """Runs conversations through a model whose weights are partly rounded and compares its answers with float's.

    Args:
        model: as the checkpoint has it; it is left so.
    """

    def __init__(self, model: LoadedModel, conversations: Sequence[Conversation]) -> None:
        self._model, self._conversations = model, conversations
        self._layers = len(model.vlm.language_model.layers)
        self._answers = answer_numbers(conversations)  # [A]
        model.use({})
        self._float = self._logits_from(0, decoder_inputs(model, conversations)).log_softmax(-1)  # [A, V]

    def measure(self, parts: Sequence[Part], progress: Callable[[str], None]) -> dict[str, dict[Bits, Loss]]:
        """Part's name -> bits -> loss. The states before a layer are computed once for all parts behind them."""
        meter = Meter("sensitivity", len(parts) * len(WIDTHS), progress)
        found: dict[str, dict[Bits, Loss]] = {}
        self._model.use({})
        states, at = decoder_inputs(self._model, self._conversations), 0
        for part in parts:  # in the order of their layers
            while part.layer is not None and at < part.layer:
                states, at = through_layer(self._model, at, states), at + 1
            found[part.name] = {}
            for bits, storage in WIDTHS.items():
                self._model.use(RoundedPart(self._model.weights, {name: storage for name in part.weights}))
                found[part.name][bits] = self._loss(states if part.layer is not None else None, at)
                self._model.use({})
                meter.advance()
        return found

    def of_weights(self, changed: Mapping[str, torch.Tensor]) -> Loss:
        """The loss with these weights in place of the checkpoint's."""
        self._model.use(changed)
        loss = self._loss(None, 0)
        self._model.use({})
        return loss

    def _loss(self, states: Sequence[torch.Tensor] | None, layer: int) -> Loss:
        if states is None:
            states, layer = decoder_inputs(self._model, self._conversations), 0
        return compare(self._logits_from(layer, states), self._float, self._answers)

    def _logits_from(self, layer: int, states: Sequence[torch.Tensor]) -> torch.Tensor:
        for number in range(layer, self._layers):
            states = through_layer(self._model, number, states)
        return answer_logits(self._model, states, self._conversations)


def compare(logits: torch.Tensor, wanted: torch.Tensor, answers: torch.Tensor) -> Loss:
    """Logits [A, V] against log probabilities [A, V] of the same tokens; ``answers`` [A] numbers whose they are."""
    divergence = nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)  # [A]
    changed = logits.argmax(-1) != wanted.argmax(-1)  # [A]
    flipped = answers[changed].unique().numel()
    return Loss(kl=float(divergence.mean().clamp_min(0)), flips_percent=100 * flipped / int(answers.max() + 1))


def answer_numbers(conversations: Sequence[Conversation]) -> torch.Tensor:
    """For each answer token of all conversations, the number of its answer [A]: positions in a row are one answer."""
    numbers: list[int] = []
    current = -1
    for one in conversations:
        before: Any = None
        for position in one.answered.tolist():
            current += before is None or position != before + 1
            before = position
            numbers.append(current)
    return torch.tensor(numbers)
