"""Families of the demo world -> the six groups of skills that the evidence averages over."""

from __future__ import annotations

from collections.abc import Mapping

GROUPS = {
    "attributes": ("colour", "shape", "hue_check"),
    "counting": ("count", "count_check"),
    "position": ("where", "place_check", "relation"),
    "reading": ("word", "hinted_word", "word_check"),
    "existence": ("existence",),
    "choice": ("choice", "category_choice"),
}


def by_group(families: Mapping[str, float]) -> dict[str, float]:
    """Family -> percent right, to group -> mean over its families; the unseen split lacks those without a picture."""
    found = {group: [families[name] for name in names if name in families] for group, names in GROUPS.items()}
    return {group: sum(values) / len(values) for group, values in found.items()}


def mean_accuracy(families: Mapping[str, float]) -> float:
    """Mean over the six groups, percent."""
    return sum(by_group(families).values()) / len(GROUPS)
