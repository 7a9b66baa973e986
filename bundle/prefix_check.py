"""Runtime and golden cases -> whether the prefix cache is what this runtime's own prefill computes."""

from __future__ import annotations

from dataclasses import dataclass

from bundle.golden import Recording
from bundle.manifest import Manifest
from bundle.prefix import known_rows, read_rows
from bundle.prompt import splice
from bundle.replay import relative_error
from bundle.runtimes.contract import Runtime
from bundle.runtimes.onnx import OnnxRuntime


@dataclass(frozen=True)
class PrefixCheck:
    """Worst relative L2 errors of the cache against a fresh prefill.

    Attributes:
        rows: that the cache holds.
        cache_error: of one layer's keys or values.
        logits_error: of a golden case's first logits, computed from the cache instead of from the first token on.
        tolerance: of both; that of the first logits, since it is the same rounding that moves them.
        where: tensor of ``cache_error``, case of ``logits_error``.
    """

    rows: int
    cache_error: float
    logits_error: float
    tolerance: float
    where: tuple[str, str]

    @property
    def ok(self) -> bool:
        """Both within tolerance; an error that is not a number is not."""
        return self.cache_error <= self.tolerance and self.logits_error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"prefix cache of {self.rows} rows against a fresh prefill: keys and values off by {self.cache_error:.1e} "
            f"({self.where[0]}), first logits by {self.logits_error:.1e} (case '{self.where[1]}'), allowed "
            f"{self.tolerance:.1e}"
        )


def check_prefix(runtime: Runtime, manifest: Manifest, golden: Recording, tolerance: float) -> PrefixCheck | None:
    """Prefill the prefix, and every golden case with and without the cache; None where the bundle has no cache."""
    prefix = manifest.prefix_cache
    if prefix is None:
        return None
    assert isinstance(runtime, OnnxRuntime)  # no other target is exported with one
    fresh = runtime.prefill(prefix.token_ids)
    stored = read_rows(golden.bundle, manifest)
    cache = max((relative_error(stored[name], fresh[name]), name) for name in fresh)
    image_id, logits = manifest.tokenizer.image_token_id, (0.0, golden.cases[0].name)
    for case in golden.cases:
        visual = golden.vector(case, "visual_tokens") if case.image is not None else None
        rows = splice(case.token_ids, image_id, golden.vector(case, "embeddings"), visual)  # [1, L, D]
        runtime.reset()
        whole = runtime.decode(rows)
        known = known_rows(manifest, case.token_ids)
        runtime.reset(known)
        logits = max(logits, (relative_error(runtime.decode(rows[:, known:]), whole), case.name))
    return PrefixCheck(len(prefix.token_ids), cache[0], logits[0], tolerance, (cache[1], logits[1]))
