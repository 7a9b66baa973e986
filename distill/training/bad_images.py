"""Rows whose image could not be read, as training meets them -> one line and the end, or a list that a resume keeps.

The list lies in the work folder, a file a process, a line whenever a row is left out; entries of steps that a resumed
run repeats are dropped when it begins, so that its count is that of a straight run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from distill.batches.image_store import BadImageError, ImageStore
from distill.data.rows import Rows
from distill.settings.training import OnBadImage

LIST_FILES = "bad_images.*.jsonl"
SHOWN = 5  # names on the console and in the card; the training log has them all


@dataclass(frozen=True)
class LeftOut:
    """A row that sat out a step."""

    step: int
    row: int
    reason: str


class BadImages:
    """What to do about the rows that a batch lacks, and which these were.

    Args:
        images: reads an image once more to learn what is wrong with it.
        folder: of the unfinished run.
        process: rank of this process; each has its own list.
        first_step: where the run begins; what the list says of this step and later ones is forgotten.
    """

    def __init__(
        self,
        rows: Rows,
        images: ImageStore,
        action: OnBadImage,
        folder: Path,
        console: Console,
        process: int = 0,
        first_step: int = 0,
    ) -> None:
        self._rows, self._images, self._action, self._console = rows, images, action, console
        self._path = folder / LIST_FILES.replace("*", str(process))
        before = [one for one in read_list(self._path) if one.step < first_step]
        if self._path.is_file():
            self._path.write_text("".join(_line(one) for one in before), encoding="utf-8")
        self.count = len(before)

    def meet(self, numbers: list[int], step: int) -> None:
        """Rows left out of a batch at ``step``.

        Raises:
            BadImageError: bad images stop the run.
        """
        for number in numbers:
            reason = self._reason(number)
            if self._action == "stop":
                raise BadImageError(f"{reason}; mend it and add --resume, or leave such rows out: --on-bad-image skip")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(LeftOut(step, number, reason)))
            self.count += 1
            if self.count <= SHOWN:
                self._console.print(f"left out at step {step}: {reason}", soft_wrap=True)

    def _reason(self, number: int) -> str:
        row = self._rows[number]
        try:
            self._images.decode(row)
        except BadImageError as error:
            return str(error)
        return f"row {number}: image {row.image} could not be read when its batch was made, and can be now"


def read_all(folder: Path) -> list[LeftOut]:
    """The lists of all processes, by step and row."""
    found = [one for path in folder.glob(LIST_FILES) for one in read_list(path)]
    return sorted(found, key=lambda one: (one.step, one.row))


def read_list(path: Path) -> list[LeftOut]:
    """The list of one process; a last line that was cut off by a kill is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [LeftOut(**json.loads(line)) for line in lines if line.endswith("\n")]


def _line(one: LeftOut) -> str:
    return json.dumps(asdict(one)) + "\n"
