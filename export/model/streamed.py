"""Checkpoint directory -> MobileVlm whose weights stay in their files: a module holds them as float32 while it runs.

A 1.7B model would take 6.7 GB as float32, a 7B one 28 GB; this one takes its largest decoder layer, 0.2 or 0.8 GB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from distill.models.checkpoint import StoredTensor, load_vlm, open_checkpoint
from distill.models.mobilevlm import MobileVlm
from export.model.graph_weights import EMBEDDING
from export.weights.lazy import LazyWeights, read_weight

HEAD = "lm_head.weight"


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


class LoadedModel:
    """A MobileVlm whose modules get their weights when they run, unless they have them and nothing else was asked for.

    Parameters on the meta device get the checkpoint's; all get those of ``use`` where it names them. A module gives
    them back when it has run or is no longer ``held``.

    Attributes:
        vlm: runs as any other.
        weights: state-dict name -> the checkpoint's weight, in any float type.
        buffer_bytes: what all weights that were in memory at once since the last ``use`` took, beside the model's own.
    """

    def __init__(self, vlm: MobileVlm, weights: Mapping[str, torch.Tensor]) -> None:
        self.vlm, self.weights = vlm, weights
        self._changed: Mapping[str, torch.Tensor] = {}
        self._free: dict[torch.Size, list[torch.Tensor]] = {}  # to be filled again
        self.buffer_bytes = 0
        self._names: dict[nn.Module, str] = {}  # of modules with parameters of their own, when they are hooked
        self._held: set[nn.Module] = set()
        self._own: dict[nn.Module, dict[str, nn.Parameter]] = {}  # what stood in the module before it was filled
        if any(parameter.is_meta for parameter in vlm.parameters()):
            make_buffers(vlm)
            self._hook()

    def use(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Compute with these weights from now on, e.g. those that quantized files hold, for the others as before.

        Memory that weights lay in is let go. The first call puts hooks on ``vlm``: exporters copy and trace it before.
        """
        self._changed = changed
        self._free.clear()
        self.buffer_bytes = 0
        if not self._names:
            self._hook()

    @contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        """Have the weights of a part of the model in memory during the block, for several calls of it."""
        parts = [part for part in module.modules() if part in self._names]
        try:
            for part in parts:
                self._fill(part)
                self._held.add(part)
            yield
        finally:
            for part in parts:
                self._held.discard(part)
                self._empty(part)

    def _hook(self) -> None:
        for name, module in self.vlm.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                self._names[module] = f"{name}." if name else ""
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, _inputs: object) -> None:
        if module not in self._held:
            self._fill(module)

    def _after(self, module: nn.Module, _inputs: object, _output: object) -> None:
        if module not in self._held:
            self._empty(module)

    def _fill(self, module: nn.Module) -> None:
        own = self._own.setdefault(module, {})
        for part, parameter in list(module.named_parameters(recurse=False)):
            name = self._names[module] + part
            source = self._changed if name in self._changed else self.weights if parameter.is_meta else None
            if source is not None:
                buffer = self._buffer(parameter.shape)
                read_weight(source, name, buffer)
                own[part] = parameter
                setattr(module, part, nn.Parameter(buffer, requires_grad=False))

    def _buffer(self, shape: torch.Size) -> torch.Tensor:
        free = self._free.setdefault(shape, [])
        if free:
            return free.pop()
        buffer = torch.empty(shape)
        self.buffer_bytes += buffer.nbytes
        return buffer

    def _empty(self, module: nn.Module) -> None:
        for part, parameter in self._own.pop(module, {}).items():
            self._free.setdefault(parameter.shape, []).append(module.get_parameter(part).data)
            setattr(module, part, parameter)


def open_streamed(checkpoint: str | Path) -> LoadedModel:
    """Open a checkpoint without reading its weights.

    Raises:
        UsageError: the directory, config, weights or vision tower is missing, unsupported or damaged.
    """
    vlm, stored = open_checkpoint(checkpoint)
    if vlm.config.text_config.tie_word_embeddings:
        stored = stored | {HEAD: stored[EMBEDDING]}
    return LoadedModel(vlm, CheckpointWeights(stored))


def open_whole(checkpoint: str | Path) -> LoadedModel:
    """Open a checkpoint and read it.

    Raises:
        UsageError: as ``open_streamed``.
    """
    vlm = load_vlm(checkpoint)
    return LoadedModel(vlm, vlm.state_dict())


def make_buffers(vlm: MobileVlm) -> None:
    """Give values to the buffers that no checkpoint stores: rotary frequencies, positions of the tower."""
    vlm.language_model.rotary_emb = type(vlm.language_model.rotary_emb)(config=vlm.config.text_config)
    embeddings = vlm.vision_tower.embeddings
    embeddings.position_ids = nn.Buffer(torch.arange(embeddings.num_positions)[None], persistent=False)
    assert not any(buffer.is_meta for buffer in vlm.buffers()), "a buffer has no values"
