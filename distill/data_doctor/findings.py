"""What the doctor of data sets found: faults and warnings by row, and the report of a whole dry run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from distill.data.messages import FaultKind

WarningKind = Literal["image-rotated", "image-duplicate", "image-near-duplicate"]
KEPT_FINDINGS = 100_000  # of a kind; a wrong --images on millions of rows must not fill the memory


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one row; rows count from 0."""

    row: int
    id: str | None
    kind: FaultKind | WarningKind
    message: str


@dataclass
class Findings:
    """Findings, and how many there were of each kind: of one kind only the first KEPT_FINDINGS are listed."""

    listed: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, row: int, name: str | None, kind: FaultKind | WarningKind, message: str) -> None:
        """Count a finding, and list it if there is room."""
        self.counts[kind] += 1
        if self.counts[kind] <= KEPT_FINDINGS:
            self.listed.append(Finding(row, name, kind, message))

    def by_kind(self) -> dict[str, int]:
        """Number of findings by kind, most frequent first."""
        return dict(self.counts.most_common())

    @property
    def left_out(self) -> int:
        """Findings that were counted and are not listed."""
        return self.counts.total() - len(self.listed)


@dataclass
class DataReport:
    """What a dry run saw. ``longest`` is in positions; a lower bound unless ``exact_lengths``."""

    data: Path
    rows: int
    with_image: int = 0
    images: int = 0
    longest: int = 0
    exact_lengths: bool = False
    faulty_rows: int = 0
    benchmark_pictures: int = 0
    all_faults: Findings = field(default_factory=Findings)
    all_warnings: Findings = field(default_factory=Findings)

    @property
    def text_only(self) -> int:
        return self.rows - self.with_image

    @property
    def faults(self) -> list[Finding]:
        return self.all_faults.listed

    @property
    def warnings(self) -> list[Finding]:
        return self.all_warnings.listed

    def sort(self) -> None:
        """By row; findings of one row stay in the order they were made in."""
        for found in (self.faults, self.warnings):
            found.sort(key=lambda finding: finding.row)

    def as_json(self) -> dict[str, object]:
        """Everything, for --json."""
        return {
            "data": str(self.data),
            "rows": self.rows,
            "with_image": self.with_image,
            "text_only": self.text_only,
            "images": self.images,
            "benchmark_pictures": self.benchmark_pictures,
            "longest": self.longest,
            "exact_lengths": self.exact_lengths,
            "faulty_rows": self.faulty_rows,
            "fault_counts": self.all_faults.by_kind(),
            "warning_counts": self.all_warnings.by_kind(),
            "faults_left_out": self.all_faults.left_out,
            "warnings_left_out": self.all_warnings.left_out,
            "faults": [asdict(found) for found in self.faults],
            "warnings": [asdict(found) for found in self.warnings],
        }
