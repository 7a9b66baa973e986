"""The same LLaVA rows in each of the formats that training reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Raw = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant"}


def as_messages(row: Any, parts: bool = False) -> Any:
    """A LLaVA row -> the same as Hugging Face messages, contents as strings or as lists of parts."""
    if not isinstance(row, dict):
        return row
    rest = {key: value for key, value in row.items() if key not in ("conversations", "image")}
    if "conversations" in row:
        talk = row["conversations"]
        rest["messages"] = [_message(one, parts) for one in talk] if isinstance(talk, list) else talk
    if row.get("image") is not None:
        rest["images"] = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return rest


def _message(turn: Any, parts: bool) -> Any:
    if not isinstance(turn, dict):
        return turn
    text = turn.get("value")
    if parts and isinstance(text, str):
        pieces = text.split("<image>")
        content: list[Raw] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            content += [{"type": "image"}, {"type": "text", "text": piece}]
        text = content or [{"type": "text", "text": ""}]
    return {"role": ROLES.get(turn.get("from", ""), turn.get("from")), "content": text}


def write_list(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def write_lines(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_messages(folder: Path, rows: list[Any]) -> Path:
    return write_list(folder, [as_messages(row) for row in rows])


def write_parts(folder: Path, rows: list[Any]) -> Path:
    return write_lines(folder, [as_messages(row, parts=True) for row in rows])


def write_parquet(folder: Path, rows: list[Any]) -> Path:
    """Images as structs of bytes and path, as the datasets library writes them."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = [as_messages(row) for row in rows]
    for row in table:
        row["images"] = [_struct(folder, name) for name in row.get("images", [])]
    path = folder / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(table), path, row_group_size=2)
    return path


def _struct(folder: Path, name: str) -> Raw:
    path = folder / name
    return {"bytes": path.read_bytes() if path.is_file() else None, "path": name}


def write_tar(folder: Path, rows: list[Any]) -> Path:
    """Two shards; the picture of a row lies beside it."""
    shards = folder / "shards"
    shards.mkdir()
    half = (len(rows) + 1) // 2
    for number in range(2):
        with tarfile.open(shards / f"s-{number:06d}.tar", "w") as tar:
            for i in range(number * half, min(len(rows), (number + 1) * half)):
                add_sample(tar, f"{i:05d}", rows[i], folder)
    return shards / "s-{000000..000001}.tar"


def write_tar_messages(folder: Path, rows: list[Any]) -> Path:
    pattern = write_tar(folder, [as_messages(row) | _named(row) for row in rows])
    return pattern.parent


def _named(row: Raw) -> Raw:
    return {"image": row["image"]} if isinstance(row.get("image"), str) else {}


def add_sample(tar: tarfile.TarFile, key: str, row: Any, folder: Path) -> None:
    image = row.get("image") if isinstance(row, dict) else None
    if isinstance(image, str) and (folder / image).is_file():
        add_member(tar, key + Path(image).suffix, (folder / image).read_bytes())
    add_member(tar, f"{key}.json", json.dumps(row).encode())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "list": write_list,
    "lines": write_lines,
    "messages": write_messages,
    "parts": write_parts,
    "parquet": write_parquet,
    "tar": write_tar,
    "tar-messages": write_tar_messages,
}
