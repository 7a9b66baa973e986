"""The bundle's prefix cache: a prompt's ids -> rows that need no prefill; the rows themselves <-> their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bundle.errors import UsageError
from bundle.manifest import Manifest
from bundle.runtimes.contract import CacheRows
from bundle.staging import inside

PREFIX_FILE = "prefix_cache.safetensors"


def known_rows(manifest: Manifest, token_ids: Sequence[int]) -> int:
    """Rows of the cache that a prompt may start with; one row at least is left to compute logits from.

    A row depends on the tokens up to its own alone, so any common beginning will do: without an image the last blank of
    the prefix becomes part of the question's first token.
    """
    if manifest.prefix_cache is None:
        return 0
    pairs = zip(manifest.prefix_cache.token_ids, token_ids, strict=False)
    common = next((at for at, (known, asked) in enumerate(pairs) if known != asked), None)
    shorter = min(len(manifest.prefix_cache.token_ids), len(token_ids))
    return min(shorter if common is None else common, len(token_ids) - 1)


def write_rows(path: Path, rows: Mapping[str, CacheRows]) -> None:
    """Write keys and values by the names of the decoder's inputs."""
    save_file({name: np.ascontiguousarray(values) for name, values in rows.items()}, path)
    path.chmod(0o644)  # safetensors makes it 0600, which a phone's app could not read after a push


def read_rows(bundle: Path, manifest: Manifest) -> dict[str, CacheRows]:
    """Read keys and values; empty where the bundle has no prefix cache.

    Raises:
        UsageError: the file is missing, damaged, or not of the manifest's sizes.
    """
    if manifest.prefix_cache is None:
        return {}
    path, shape = inside(bundle, manifest.prefix_cache.path, "prefix cache"), manifest.model
    try:
        rows = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"prefix cache {path} cannot be read ({error}); export the bundle again") from error
    caches = [tensor for tensor in manifest.graphs["text_decoder"].inputs if tensor.name.startswith("past_key_values.")]
    wanted = (1, shape.num_kv_heads, len(manifest.prefix_cache.token_ids), shape.head_dim)
    for tensor in caches:
        found = rows.get(tensor.name)
        if found is None or found.shape != wanted or found.dtype != np.dtype(tensor.dtype):
            instead = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise UsageError(
                f"{path}: '{tensor.name}' must be {tensor.dtype} {list(wanted)}, found {instead}; export again"
            )
    return rows
