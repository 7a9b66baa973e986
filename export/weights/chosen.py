"""Folder of chosen codes <-> the weights that they stand for, one at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from export.weights.grid import Coded
from export.weights.lazy import LazyWeights

SUFFIX = ".safetensors"


class ChosenWeights(LazyWeights):
    """State-dict name -> float32 values of the codes in a folder, one file a weight."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._names = {path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")}

    def keep(self, name: str, coded: Coded) -> None:
        """Write the codes of one weight; a file of that name is whole or not there."""
        path = self._folder / f"{name}{SUFFIX}"
        aside = path.with_suffix(".aside")
        save_file({"codes": coded.codes.contiguous(), "scales": coded.scales.contiguous()}, aside)
        aside.replace(path)
        self._names.add(name)

    def coded(self, name: str) -> Coded:
        """Codes and scales of one weight."""
        with safe_open(self._folder / f"{name}{SUFFIX}", "pt") as file:
            return Coded(file.get_tensor("codes"), file.get_tensor("scales"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.coded(name).values()

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)
