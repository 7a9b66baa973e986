"""How each weight of one graph is stored -> the manifest's words for a recipe of the user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bundle.manifest import GraphQuantization
from export.weights.recipe import Storage


def described(storages: Iterable[Storage], activations: str, channel_block: int | None = None) -> GraphQuantization:
    """The storage of most quantized matrices, then the others by number.

    Args:
        activations: what the graph's kernels round them to.
        channel_block: values that share a scale where the recipe says one per channel; None: a whole channel does.
    """
    counted = Counter(storages)
    kinds = [storage for storage, _ in counted.most_common() if storage.bits < 16]
    if not kinds:
        return GraphQuantization(weights="float32", activations="float32")
    weights = f"int{kinds[0].bits} symmetric"
    for kind in kinds[1:]:
        weights += f"; {counted[kind]} matrices int{kind.bits} symmetric"
    return GraphQuantization(weights=weights, group_size=kinds[0].group_size or channel_block, activations=activations)


def with_fallbacks(decoder: GraphQuantization, count: int) -> GraphQuantization:
    """The decoder's line with the number of matrices that are int8 because the group does not divide their width."""
    if not count:
        return decoder
    weights = f"{decoder.weights}; {count} int8 (width not a multiple of {decoder.group_size})"
    return decoder.model_copy(update={"weights": weights})
