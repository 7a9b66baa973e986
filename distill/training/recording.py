"""--cache and the processes of a run -> what a teacher said to every conversation, looked up once between them."""

from __future__ import annotations

import functools
import operator

from rich.console import Console
from rich.progress import Progress

from distill.batches.dataset import LlavaDataset
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing
from distill.settings.training import DistillConfig
from distill.teacher_cache.cache import TeacherCache
from distill.teacher_cache.search import CacheSearch
from distill.training.ranks import Ranks


def find_recording(
    config: DistillConfig,
    ranks: Ranks,
    student: MobileVlm,
    processing: Processing,
    dataset: LlavaDataset,
    console: Console,
) -> TeacherCache | None:
    """The recording that serves all conversations; None without --cache or when no term needs a teacher.

    Every process must ask: each encodes and looks up its share of the conversations, and what they lack is added up.

    Raises:
        UsageError: the cache does not serve this run.
    """
    if config.cache is None:
        return None
    if not config.needs_teacher:
        console.print(f"teacher cache {config.cache} is not opened: no loss term with a weight needs it")
        return None
    with ranks.agreed(), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        search = CacheSearch(config, student, processing)
        share = range(ranks.index, len(dataset), ranks.count)
        examples = progress.track((dataset[i] for i in share), len(share), description="teacher cache")
        lacking = search.lacking(examples)
    lacking = functools.reduce(operator.add, ranks.gathered(lacking))
    with ranks.agreed():
        cache = search.chosen(lacking)
    console.print(
        f"teacher {cache.teacher.sha256[:12]} is read from {config.cache}: {', '.join(sorted(cache.parts))}",
        soft_wrap=True,
    )
    return cache
