"""Model, calibration, plan -> codes of every 4-bit matrix, decoder layer by decoder layer.

Each layer is quantized for the states that the quantized layers before it produce (section 4 of the GPTQ paper), so two
passes of all conversations through each layer are made, and one layer is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from export.job.meter import Meter
from export.model.streamed import LoadedModel
from export.quantize.calibration import Calibration
from export.quantize.gptq import gptq
from export.quantize.hqq import hqq
from export.quantize.methods import Method
from export.quantize.passes import answer_rows, decoder_inputs, through_layer
from export.weights.chosen import ChosenWeights
from export.weights.recipe import HEAD, Storage

LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
Hessians = dict[str, torch.Tensor]


def choose_codes(
    model: LoadedModel,
    storages: Mapping[str, Storage],
    method: Method,
    calibration: Calibration | None,
    chosen: ChosenWeights,
    signed: bool,
    progress: Callable[[str], None],
) -> None:
    """Choose the codes of all weights that ``storages`` puts at 4 bits; those in ``chosen`` already are kept.

    With GPTQ, matrices outside of the decoder's layers and head (the embedding, the tower) take HQQ's scales: nothing
    is lost by rounding a table's rows each for itself, and the tower is 8 bits wide unless a recipe says otherwise.

    Args:
        method: hqq or gptq; rounding to nearest is what the targets' packers do by themselves.
        calibration: for gptq.
        signed: the target takes scales below 0.
    """
    names = [name for name, storage in storages.items() if storage.bits == 4]
    meter = Meter("codes chosen", len(names), progress)
    if method == "gptq":
        assert calibration is not None, "the command asks for it before"
        _gptq_decoder(model, {name: storages[name] for name in names}, calibration, chosen, signed, meter)
    for name in names:
        if name not in chosen:
            chosen.keep(name, hqq(model.weights[name].float(), _group(storages[name])))
            meter.advance()
    progress(f"{len(names)} matrices: codes chosen by {method}")


def _gptq_decoder(
    model: LoadedModel,
    storages: Mapping[str, Storage],
    calibration: Calibration,
    chosen: ChosenWeights,
    signed: bool,
    meter: Meter,
) -> None:
    """Layers in order, then the head; the states run on with the chosen weights."""
    conversations = calibration.conversations
    model.use({})
    states = decoder_inputs(model, conversations)
    for number in range(len(model.vlm.language_model.layers)):
        mine = [name for name in storages if (match := LAYER.match(name)) and int(match[1]) == number]
        if any(name not in chosen for name in mine):
            with _inputs_of(model, mine) as hessians:
                through_layer(model, number, states)
            _choose(model, mine, hessians, storages, chosen, signed, meter)
        model.use(chosen)
        states = through_layer(model, number, states)
        model.use({})
    head = [name for name in storages if re.fullmatch(HEAD, name)]
    if any(name not in chosen for name in head):
        rows = answer_rows(model, states, conversations)  # [A, D]
        _choose(model, head, {name: rows.T @ rows for name in head}, storages, chosen, signed, meter)


def _choose(
    model: LoadedModel,
    names: Sequence[str],
    hessians: Hessians,
    storages: Mapping[str, Storage],
    chosen: ChosenWeights,
    signed: bool,
    meter: Meter,
) -> None:
    for name in names:
        if name not in chosen:
            chosen.keep(name, gptq(model.weights[name].float(), hessians[name], _group(storages[name]), signed))
            meter.advance()


def _group(storage: Storage) -> int:
    assert storage.group_size is not None, "4 bits come in groups"
    return storage.group_size


@contextmanager
def _inputs_of(model: LoadedModel, names: Sequence[str]) -> Iterator[Hessians]:
    """Sum up x x^T [K, K] of the inputs x of the linear layers of ``names`` while the block runs."""
    hessians: Hessians = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])  # [rows, K]
            square = rows.T @ rows
            hessians[name] = hessians[name] + square if name in hessians else square

        return add

    handles = [
        model.vlm.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(name)) for name in names
    ]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()
