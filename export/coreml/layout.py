"""Where a converted program keeps a weight otherwise than the checkpoint: part of its rows, or channels first."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How one parameter of a converted module follows from a weight of the model.

    Attributes:
        name: state-dict name of the weight.
        rows: from and to; None takes all.
        channels_first: a table [rows, C] lies as [1, C, 1, rows].
        first_last: with ``channels_first``, its first row (the class token's) lies last.
    """

    name: str
    rows: tuple[int, int] | None = None
    channels_first: bool = False
    first_last: bool = False

    def stored(self, weight: torch.Tensor) -> torch.Tensor:
        """The model's weight -> the parameter, but for axes of length 1."""
        part = weight if self.rows is None else weight[slice(*self.rows)]
        return part.roll(-int(self.first_last), 0).T[None, :, None] if self.channels_first else part

    def restored(self, parameter: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The parameter -> the weight's rows; ``shape`` is the weight's."""
        if self.channels_first:
            return parameter.reshape(shape[1], shape[0]).T.roll(int(self.first_last), 0)
        return parameter.reshape(-1, *shape[1:])
