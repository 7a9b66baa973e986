"""Loss terms + how to store -> the parts of a teacher cache that they need, each with the identity of its entries.

A part's entries are found by its identity and the sample's (or image's) content, and an identity holds only what
changes those entries: other words per row make no attention stale, another template no visual token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bundle.errors import UsageError
from bundle.staging import write_text_whole
from distill.settings.recording import CacheStorage
from distill.settings.terms import DIVERGENCE_TERMS
from distill.teacher_cache.identity import Identity, TeacherFacts, identity_hash
from distill.teacher_cache.shards import FORMAT_VERSION

OF_SAMPLES = ("rows", "attention", "focus", "groups")  # found by a conversation; the others by an image
NEEDS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    **{name: ("rows",) for name in DIVERGENCE_TERMS},
    "attention": ("attention",),
    "attention_kl": ("attention",),
    "attention_groups": ("groups",),
    "visual": ("visual",),
    "focus": ("focus", "visual"),
    "normed_visual": ("visual",),
    "relation": ("visual",),
}
FORMS = ("heads", "mean", "columns")  # of attention, the fullest first


@dataclass(frozen=True)
class Asked:
    """What a run computes with the teacher's outputs."""

    terms: tuple[str, ...]
    mask: str
    temperature: float
    top_k: int
    groups: int

    def __post_init__(self) -> None:
        unrecorded = [name for name in self.terms if name not in NEEDS]
        if unrecorded:
            raise UsageError(
                f"{', '.join(unrecorded)}: computed from a running teacher only, a cache does not hold what they need; "
                "train without --cache"
            )

    def needed(self) -> dict[str, list[str]]:
        """Part -> the terms that need it."""
        needed: dict[str, list[str]] = {}
        for term in self.terms:
            for part in NEEDS[term]:
                needed.setdefault(part, []).append(term)
        return needed


def demands(asked: Asked, teacher_sha256: str, processing: Identity) -> dict[str, Identity]:
    """Part -> the fields that its entries must have been recorded with; how they are stored is left open."""
    sample = {"format": FORMAT_VERSION, "teacher": teacher_sha256, "processing": processing}
    image = {"format": FORMAT_VERSION, "teacher": teacher_sha256, "image": processing["image"]}
    fields: dict[str, Identity] = {
        "rows": sample | {"mask": asked.mask, "temperature": asked.temperature},
        "attention": sample,
        "focus": sample | {"top_k": asked.top_k},
        "groups": sample | {"groups": asked.groups},
        "visual": image,
    }
    return {part: {"part": part} | fields[part] for part in asked.needed()}


def features_demand(tower_sha256: str, processing: Identity) -> Identity:
    """The same for features of a vision tower, whoever owns it."""
    return {"part": "features", "format": FORMAT_VERSION, "tower": tower_sha256, "image": processing["image"]}


def stored_as(asked: Asked, storage: CacheStorage, demand: Identity) -> Identity:
    """A demand with how its entries are stored: the identity of what is recorded."""
    identity = demand | {"precision": storage.precision}
    if demand["part"] == "rows":
        return identity | {"words": storage.words}
    if demand["part"] == "attention":
        if "attention" in asked.terms:  # a learned map reads every head, and a square leaves no room for chance
            return identity | {"form": "heads"}
        return identity | ({"form": "columns", "columns": storage.columns} if storage.columns else {"form": "mean"})
    if demand["part"] == "focus":
        del identity["precision"]  # indexes
    return identity


class PartLedger:
    """The identities that a cache was ever recorded with, and its teachers: CACHE/parts and CACHE/teachers."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def enter(self, teacher: TeacherFacts, identities: Iterable[Identity]) -> None:
        """Write down what is about to be recorded."""
        write_text_whole(self._cache / "teachers" / f"{teacher.sha256}.json", json.dumps(asdict(teacher)) + "\n")
        for identity in identities:
            path = self._cache / "parts" / f"{identity_hash(identity)}.json"
            write_text_whole(path, json.dumps(identity, sort_keys=True) + "\n")

    def teachers(self) -> list[TeacherFacts]:
        return [TeacherFacts(**_json(path)) for path in sorted((self._cache / "teachers").glob("*.json"))]

    def identities(self, part: str) -> list[Identity]:
        """All of a part, the fullest storage first."""
        found = [_json(path) for path in sorted((self._cache / "parts").glob("*.json"))]
        return sorted((one for one in found if one["part"] == part), key=_fullness, reverse=True)

    def matching(self, demand: Identity, form: str | None = None) -> list[Identity]:
        """Recorded identities that meet a demand, fullest first; ``form`` restricts how attention is stored."""
        return [
            one
            for one in self.identities(demand["part"])
            if all(one.get(name) == value for name, value in demand.items()) and form in (None, one.get("form"))
        ]

    def differences(self, demand: Identity) -> str:
        """Why nothing matches: the fields of the nearest identity that differ, in words."""
        asked = _flat(demand)
        nearest: list[str] | None = None
        for one in map(_flat, self.identities(demand["part"])):
            differing = [
                f"{name} {_short(one.get(name))}, this run asks for {_short(value)}"
                for name, value in asked.items()
                if one.get(name) != value
            ]
            if nearest is None or len(differing) < len(nearest):
                nearest = differing
        return "none was ever recorded" if nearest is None else "recorded were " + "; ".join(nearest)


def _fullness(identity: Identity) -> tuple[int, int, int]:
    form = identity.get("form")
    return (
        -FORMS.index(form) if form else 0,
        int(identity.get("words", 0) or identity.get("columns", 0)),
        identity.get("precision") == "float32",
    )


def _flat(identity: Identity) -> dict[str, Any]:
    """processing's fields by their own names."""
    return {name: value for name, value in identity.items() if name != "processing"} | identity.get("processing", {})


def _short(value: Any) -> str:
    text = value[:12] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value
