"""Fingerprints of many pictures -> which look like which: copies within a data set, and pictures of a benchmark in it.

All pairs are walked in pieces and only the best partner of each picture is kept: memory grows with pictures, not pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from distill.data_doctor.image_hash import HASH_BITS, SIDE, Fingerprints, Numbers, band

# Largest difference of a thumbnail's channel: copies at JPEG quality 30 mostly stay below 14, copies brighter by 10 %
# below 24; no two of 400 different demo scenes within 12 bits of each other were as close.
THUMBNAIL_TOLERANCE = 24
PAIRS_AT_ONCE = 1 << 20
THUMBNAILS_AT_ONCE = PAIRS_AT_ONCE // (SIDE * SIDE)
Pairs = tuple[Numbers, Numbers, NDArray[np.uint8]]


def first_copies(prints: Fingerprints, distance: int) -> Numbers:
    """For each picture the first one before it that looks like it, or itself [pictures]."""
    first = np.arange(len(prints))
    for lefts, rights, _ in like_pairs(prints, prints, distance):
        np.minimum.at(first, lefts, rights)
    return first


def nearest(prints: Fingerprints, others: Fingerprints, distance: int) -> tuple[Numbers, Numbers, NDArray[np.uint8]]:
    """Pictures that look like one of ``others``, the one with the nearest hash, and how many bits differ."""
    worst = (HASH_BITS + 1) * len(others)
    best = np.full(len(prints), worst)
    for lefts, rights, bits in like_pairs(prints, others, distance):
        np.minimum.at(best, lefts, bits.astype(np.intp) * len(others) + rights)
    found = np.flatnonzero(best < worst)
    return found, best[found] % len(others), (best[found] // len(others)).astype(np.uint8)


def like_pairs(left: Fingerprints, right: Fingerprints, distance: int) -> Iterator[Pairs]:
    """Pairs whose hashes differ in at most ``distance`` bits and whose thumbnails agree, some pairs several times.

    The bits of a hash are cut into ``distance + 1`` bands. So many flipped bits leave one band whole, hence only hashes
    that share a band are compared, found by sorting: the cost grows with pictures that agree in a band, not with all
    pairs.
    """
    edges = np.linspace(0, HASH_BITS, distance + 2).astype(int)
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        ours, theirs = band(left["hash"], begin, end), band(right["hash"], begin, end)
        order = np.argsort(theirs, kind="stable")
        first = np.searchsorted(theirs[order], ours, "left")
        counts = np.searchsorted(theirs[order], ours, "right") - first
        for some in _shares(counts):
            lefts = np.repeat(some, counts[some])
            within = np.arange(len(lefts)) - np.repeat(np.cumsum(counts[some]) - counts[some], counts[some])
            rights = order[np.repeat(first[some], counts[some]) + within]
            yield _like(left, right, lefts, rights, distance)


def _like(left: Fingerprints, right: Fingerprints, lefts: Numbers, rights: Numbers, distance: int) -> Pairs:
    bits = np.bitwise_count(left["hash"][lefts] ^ right["hash"][rights]).sum(axis=1, dtype=np.uint8)
    near = bits <= distance
    lefts, rights, bits = lefts[near], rights[near], bits[near]
    agree = np.zeros(len(lefts), np.bool_)
    for start in range(0, len(lefts), THUMBNAILS_AT_ONCE):
        piece = slice(start, start + THUMBNAILS_AT_ONCE)
        difference = left["thumbnail"][lefts[piece]].astype(np.int16) - right["thumbnail"][rights[piece]]
        agree[piece] = (np.abs(difference) <= THUMBNAIL_TOLERANCE).all(axis=(1, 2, 3))
    return lefts[agree], rights[agree], bits[agree]


def _shares(counts: Numbers) -> Iterator[Numbers]:
    """Numbers of the entries that have pairs, in shares of about PAIRS_AT_ONCE pairs."""
    busy = np.flatnonzero(counts)
    if len(busy):
        cuts = np.flatnonzero(np.diff(np.cumsum(counts[busy]) // PAIRS_AT_ONCE)) + 1
        yield from np.split(busy, cuts)
