"""Mappings of weights that are read from a file when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch


class LazyWeights(Mapping[str, torch.Tensor], ABC):
    """State-dict name -> weight, read from a file when asked for."""

    @abstractmethod
    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Write a weight into ``out``, a float32 tensor of its shape.

        Filling a tensor that is used again and again takes a twentieth of the time of making a new one: new memory is
        handed out page by page.
        """

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)  # Mapping's own would read the weight


class Layered(LazyWeights):
    """The weights of two mappings; where both have a name, the first one's."""

    def __init__(self, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
        self._first, self._second = first, second

    def _of(self, name: str) -> Mapping[str, torch.Tensor]:
        return self._first if name in self._first else self._second

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._of(name)[name]

    def read_into(self, name: str, out: torch.Tensor) -> None:
        read_weight(self._of(name), name, out)

    def __contains__(self, name: object) -> bool:
        return name in self._first or name in self._second

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from (name for name in self._second if name not in self._first)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_weight(weights: Mapping[str, torch.Tensor], name: str, out: torch.Tensor) -> None:
    """Write one weight of a mapping, lazy or not, into ``out``."""
    if isinstance(weights, LazyWeights):
        weights.read_into(name, out)
    else:
        out.copy_(weights[name])
