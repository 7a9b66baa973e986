"""Checkpoint directory -> MobileVlm whose weights stay in their files: a module holds them as float32 while it runs.

A 1.7B model would take 6.7 GB as float32, a 7B one 28 GB; this one takes its largest decoder layer, 0.2 or 0.8 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distill.models.checkpoint import StoredTensor, load_vlm, open_checkpoint
from distill.models.mobilevlm import MobileVlm
from export.contract import LazyWeights


class LoadedModel(Protocol):
    """A model whose weights are in memory or not.

    Attributes:
        vlm: runs either way.
        weights: state-dict name -> the checkpoint's weight, in any float type.
    """

    vlm: MobileVlm
    weights: Mapping[str, torch.Tensor]

    def use(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Compute with these weights from now on, e.g. those that quantized files hold; the others stay."""

    def held(self, module: nn.Module) -> AbstractContextManager[None]:
        """Have the weights of a part of the model in memory during the block, for several calls of it."""


class CheckpointWeights(LazyWeights):
    """State-dict name -> the weight as the checkpoint's files hold it."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].load()

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self._stored[name].load())

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class StreamedModel:
    """A MobileVlm that computes with the weights of a mapping, one module's at a time.

    Its parameters are on the meta device except while their module runs or is ``held``.

    Attributes:
        buffer_bytes: what all weights that were ever in memory at once took.
    """

    def __init__(self, vlm: MobileVlm, weights: LazyWeights) -> None:
        self.vlm = vlm
        self.weights: Mapping[str, torch.Tensor] = weights
        self._free: dict[torch.Size, list[torch.Tensor]] = {}  # to be filled again
        self.buffer_bytes = 0
        self._changed: Mapping[str, torch.Tensor] = {}
        self._held: set[nn.Module] = set()
        _make_buffers(vlm)
        for name, module in vlm.named_modules():
            own = [part for part, _ in module.named_parameters(recurse=False)]
            if own:
                prefix = f"{name}." if name else ""
                module.register_forward_pre_hook(self._before(prefix, own))
                module.register_forward_hook(self._after, always_call=True)

    def use(self, changed: Mapping[str, torch.Tensor]) -> None:
        self._changed = changed

    @contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        names = {inner: name for name, inner in self.vlm.named_modules()}
        parts = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
        try:
            for part in parts:
                self._fill(part, f"{names[part]}.", [name for name, _ in part.named_parameters(recurse=False)])
                self._held.add(part)
            yield
        finally:
            for part in parts:
                self._held.discard(part)
                self._empty(part)

    def _before(self, prefix: str, own: list[str]) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, _inputs: object) -> None:
            if module not in self._held:
                self._fill(module, prefix, own)

        return hook

    def _after(self, module: nn.Module, _inputs: object, _output: object) -> None:
        if module not in self._held:
            self._empty(module)

    def _fill(self, module: nn.Module, prefix: str, own: list[str]) -> None:
        for name in own:
            buffer = self._buffer(module.get_parameter(name).shape)
            read_weight(self._changed if prefix + name in self._changed else self.weights, prefix + name, buffer)
            setattr(module, name, nn.Parameter(buffer, requires_grad=False))

    def _buffer(self, shape: torch.Size) -> torch.Tensor:
        free = self._free.setdefault(shape, [])
        if free:
            return free.pop()
        buffer = torch.empty(shape)
        self.buffer_bytes += buffer.nbytes
        return buffer

    def _empty(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                self._free[parameter.shape].append(parameter.data)
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


class WholeModel:
    """A MobileVlm with all its weights in memory as float32."""

    def __init__(self, vlm: MobileVlm) -> None:
        self.vlm = vlm
        self.weights: Mapping[str, torch.Tensor] = vlm.state_dict()

    def use(self, changed: Mapping[str, torch.Tensor]) -> None:
        for name in changed:  # in place: a second copy of a large model would not fit into memory
            self.weights[name].copy_(changed[name])

    def held(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


def weight_errors(
    weights: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """Each changed weight's relative L2 distance to the one it was made of; memory holds one pair of each shape."""
    pairs: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}  # filled again, as LazyWeights says
    for name in changed:
        wanted = weights[name]
        found, difference = pairs.setdefault(wanted.shape, (torch.empty(wanted.shape), torch.empty(wanted.shape)))
        read_weight(changed, name, found)
        difference.copy_(wanted)
        norm = float(difference.norm()) or torch.finfo(torch.float32).tiny
        yield name, float(difference.sub_(found).norm()) / norm


def read_weight(weights: Mapping[str, torch.Tensor], name: str, out: torch.Tensor) -> None:
    """Write one weight of a mapping, lazy or not, into ``out``."""
    if isinstance(weights, LazyWeights):
        weights.read_into(name, out)
    else:
        out.copy_(weights[name])


def open_streamed(checkpoint: str | Path) -> StreamedModel:
    """Open a checkpoint without reading its weights.

    Raises:
        UsageError: the directory, config, weights or vision tower is missing, unsupported or damaged.
    """
    vlm, stored = open_checkpoint(checkpoint)
    return StreamedModel(vlm, CheckpointWeights(stored))


def open_whole(checkpoint: str | Path) -> WholeModel:
    """Open a checkpoint and read it.

    Raises:
        UsageError: as ``open_streamed``.
    """
    return WholeModel(load_vlm(checkpoint))


def _make_buffers(vlm: MobileVlm) -> None:
    """Give values to the buffers that no checkpoint stores: rotary frequencies, positions of the tower."""
    vlm.language_model.rotary_emb = LlamaRotaryEmbedding(config=vlm.config.text_config)
    embeddings = vlm.vision_tower.embeddings
    embeddings.position_ids = nn.Buffer(torch.arange(embeddings.num_positions)[None], persistent=False)
    assert not any(buffer.is_meta for buffer in vlm.buffers()), "a buffer has no values"
