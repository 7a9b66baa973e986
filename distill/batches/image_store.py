"""Row -> its image as pixel_values, decoded images kept within a budget; an image that cannot be read is named."""

from __future__ import annotations

import torch

from bundle.errors import AlignKDError, UsageError
from bundle.image import preprocess
from bundle.manifest import ImageSpec
from distill.data.conversation import Row
from distill.data.image_source import ImageSource, open_source
from distill.data.rows import Rows


class BadImageError(AlignKDError):
    """The image of a row cannot be read. Exit code 1: the data broke, not the command."""


class ImageStore:
    """Images of rows -> pixel_values, decoded images kept in memory while they fit the budget."""

    def __init__(self, spec: ImageSpec, budget_bytes: int) -> None:
        self._spec = spec
        self._left_bytes = budget_bytes
        self._kept: dict[ImageSource, torch.Tensor] = {}

    def pixels(self, row: Row) -> torch.Tensor:
        """The row's image as [3, S, S] float32.

        Raises:
            BadImageError: the image is missing or corrupt; the line names the row.
        """
        assert row.image is not None
        if row.image in self._kept:
            return self._kept[row.image]
        pixels = self.decode(row)
        if pixels.nbytes <= self._left_bytes:
            self._left_bytes -= pixels.nbytes
            self._kept[row.image] = pixels
        return pixels

    def blank(self) -> torch.Tensor:
        """A picture of nothing [3, S, S], for a batch without one: see ``AlignKD.forward``."""
        return torch.zeros(3, self._spec.size, self._spec.size)

    def decode(self, row: Row) -> torch.Tensor:
        """As ``pixels``, without keeping the image."""
        assert row.image is not None
        try:
            return torch.from_numpy(preprocess(open_source(row.image), self._spec))[0]  # [3, S, S]
        except UsageError as error:
            raise BadImageError(f"row {row.number}: {error}") from error


class OtherRowsImages:
    """For a row, the image of the next row that has another one: what a shuffled teacher sees."""

    def __init__(self, images: ImageStore, rows: Rows) -> None:
        self._images, self._rows = images, rows
        self._with_image = rows.with_image.nonzero()[0]  # row numbers, ascending

    def pixels(self, row: Row) -> torch.Tensor:
        """[3, S, S]; the row's own image where the data set has no other.

        Raises:
            BadImageError: the other image is missing or corrupt; the line names its row.
        """
        count = len(self._with_image)
        here = int(self._with_image.searchsorted(row.number))
        for step in range(1, count):
            other = self._rows[int(self._with_image[(here + step) % count])]
            if other.image != row.image:
                return self._images.pixels(other)
        return self._images.pixels(row)
