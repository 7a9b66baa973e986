"""Entries by key <-> shards of a folder: safetensors files built aside, named by their own hash, read through mmap.

A shard holds entries of several parts; an entry is some named tensors with one leading dimension. No index is kept
beside the shards: each brings the keys of its entries, so that a rename makes a shard and its entries
appear at once, in whatever process, and nothing can fall out of step. A small ``.json`` beside each says that it is
whole, how long it is and what its hash is; a shard without one was cut off and does not count.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bundle.errors import UsageError
from bundle.staging import sha256_of, write_text_whole

Entry = dict[str, torch.Tensor]
FORMAT_VERSION = 1
OPEN_SHARDS = 64  # mapped at a time, of file descriptors that a process may have
KEY_BYTES = 16  # of a sha256: 128 bits, so that a table of millions stays small


@dataclass
class ShardWriter:
    """Collects entries and writes a shard whenever they come to ``shard_bytes``.

    ``writer`` names it among those that write into ``folder`` at the same time.
    """

    folder: Path
    shard_bytes: int
    writer: str = "0"
    written_bytes: int = 0
    _entries: dict[str, list[tuple[bytes, Entry]]] = field(default_factory=dict)
    _bytes: int = 0

    def add(self, part: str, key: bytes, entry: Entry) -> None:
        """Keep one entry; its tensors have the same leading dimension, all others are alike within a part."""
        self._entries.setdefault(part, []).append((key, entry))
        self._bytes += KEY_BYTES + 8 + sum(tensor.nbytes for tensor in entry.values())
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is there as one shard: aside, then renamed, then declared whole."""
        if not self._entries:
            return
        tensors: dict[str, torch.Tensor] = {}
        for part, entries in self._entries.items():
            tensors |= _packed(part, entries)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{self.writer}.part"
        save_file(tensors, aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        digest, size = sha256_of(aside), aside.stat().st_size
        os.replace(aside, self.folder / f"{digest}.safetensors")
        facts = {"format": FORMAT_VERSION, "bytes": size, "entries": {p: len(e) for p, e in self._entries.items()}}
        write_text_whole(self.folder / f"{digest}.json", json.dumps(facts) + "\n")
        self.written_bytes += size
        self._entries, self._bytes = {}, 0


def _packed(part: str, entries: list[tuple[bytes, Entry]]) -> dict[str, torch.Tensor]:
    names = list(entries[0][1])
    keys = np.frombuffer(b"".join(key for key, _ in entries), np.uint8).reshape(-1, KEY_BYTES)
    lengths = [len(entry[names[0]]) for _, entry in entries]
    packed = {
        f"{part}/keys": torch.from_numpy(keys.copy()),  # [n, 16]
        f"{part}/ends": torch.tensor(lengths).cumsum(0),  # [n]
    }
    return packed | {f"{part}/{name}": torch.cat([entry[name] for _, entry in entries]) for name in names}


class ShardReader:
    """Every entry of a folder by its key; tensors are copied out of mapped files, so memory stays bounded.

    Raises:
        UsageError: a shard is missing, or not as long as it was.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._ends: dict[tuple[int, str], torch.Tensor] = {}
        self._shards = sorted(folder.glob("*.json"))
        tables = [self._table(number) for number in range(len(self._shards))]
        keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(table[0] for table in tables)])
        place = np.concatenate([np.empty((0, 2), np.int32), *(table[1] for table in tables)])
        first = keys[:, :8].copy().view(">u8")[:, 0] if len(keys) else np.empty(0, np.uint64)
        order = np.argsort(first, kind="stable")
        self._first, self._keys, self._place = first[order].astype(np.uint64), keys[order], place[order]
        self._parts = [sorted(json.loads(path.read_text())["entries"]) for path in self._shards]

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # mapped files are opened anew by who gets it

    def find(self, key: bytes) -> int | None:
        """The number of an entry, or None."""
        at = int(np.searchsorted(self._first, np.uint64(int.from_bytes(key[:8], "big"))))
        while at < len(self._keys) and self._keys[at, :8].tobytes() == key[:8]:
            if self._keys[at].tobytes() == key:
                return at
            at += 1
        return None

    def read(self, part: str, number: int) -> Entry:
        """The tensors of an entry."""
        shard, row = (int(value) for value in self._place[number])
        file = self._file(shard)
        ends = self._ends_of(shard, part)
        begin = int(ends[row - 1]) if row else 0
        prefix = f"{part}/"
        names = [name for name in file.keys() if name.startswith(prefix)]
        return {
            name.removeprefix(prefix): file.get_slice(name)[begin : int(ends[row])]
            for name in names
            if name not in (f"{prefix}keys", f"{prefix}ends")
        }

    def _ends_of(self, shard: int, part: str) -> torch.Tensor:
        if (shard, part) not in self._ends:
            self._ends[shard, part] = self._file(shard).get_tensor(f"{part}/ends").clone()
        return self._ends[shard, part]

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self._shards[shard].with_suffix(".safetensors"), framework="pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _table(self, shard: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Keys [n, 16] of a shard and, for each, (shard, row within its part) [n, 2]."""
        problem = _quick_fault(self._shards[shard])
        if problem:
            raise UsageError(
                f"{problem}; name all such shards: alignkd-distill cache --verify --cache {self._folder.parent}; "
                "then record what they held again: the recording's command with --mend"
            )
        with safe_open(self._shards[shard].with_suffix(".safetensors"), framework="numpy") as file:
            keys = [file.get_tensor(name) for name in file.keys() if name.endswith("/keys")]
        places = [np.stack([np.full(len(k), shard), np.arange(len(k))], axis=1).astype(np.int32) for k in keys]
        return np.concatenate(keys), np.concatenate(places)


def _quick_fault(record: Path) -> str | None:
    shard = record.with_suffix(".safetensors")
    if not shard.is_file():
        return f"shard {shard} is missing"
    expected, size = json.loads(record.read_text(encoding="utf-8"))["bytes"], shard.stat().st_size
    return None if size == expected else f"shard {shard} is truncated: {size} bytes of {expected}"


def shard_faults(folder: Path) -> list[str]:
    """Read every shard whole -> one line for each that is missing, truncated or altered."""
    faults = []
    for record in sorted(folder.glob("*.json")):
        fault = _quick_fault(record)
        if fault is None and sha256_of(record.with_suffix(".safetensors")) != record.stem:
            fault = f"shard {record.with_suffix('.safetensors')} was altered: its sha256 is not its name"
        if fault is not None:
            faults.append(fault)
    return faults


def drop_faulty(folder: Path) -> list[str]:
    """Remove the shards that ``shard_faults`` names, so that their entries count as missing; returns its lines."""
    faults = shard_faults(folder)
    for record in sorted(folder.glob("*.json")):
        if any(str(record.with_suffix(".safetensors")) in fault for fault in faults):
            record.with_suffix(".safetensors").unlink(missing_ok=True)
            record.unlink()
    return faults


def drop_cut_off(folder: Path) -> None:
    """Remove files that a killed recording left: no one else may be recording."""
    for path in [*folder.glob(".*"), *folder.glob("*.safetensors")]:
        if path.name.startswith(".") or not path.with_suffix(".json").is_file():
            path.unlink()
