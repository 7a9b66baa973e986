"""Data files -> located rows, one at a time: the raw JSON value, where its bytes lie, and where its image's lie."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from bundle.errors import UsageError, missing_extra
from distill.data.data_files import FORMATS, Container
from distill.data.json_elements import line_elements, list_elements
from distill.data.messages import Fault

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_BLOCK = 512
PARQUET_BATCH_ROWS = 64  # alive at a time, pictures included


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``[start, start + size)`` of the file with this number."""

    file: int = 0
    start: int = 0
    size: int = 0


@dataclass(slots=True)
class Located:
    """A raw row, its bytes, and the image that lies beside it in a shard; an image that is not there has no bytes."""

    raw: Any
    row: Span
    image: Span | None = None
    image_name: str | None = None
    faults: list[Fault] = field(default_factory=list)


def located_rows(files: list[Path], container: Container, packed: BinaryIO) -> Iterator[Located]:
    """Every row of the files, in order.

    Args:
        packed: what has no byte range that can be read alone is written here; its file number is ``len(files)``.

    Raises:
        UsageError: a file cannot be read to its end.
    """
    for number, file in enumerate(files):
        if container == "list":
            yield from (Located(one.value, Span(number, one.start, one.size)) for one in list_elements(file))
        elif container == "lines":
            yield from (Located(one.value, Span(number, one.start, one.size)) for one in line_elements(file))
        elif container == "tar":
            yield from _shard_rows(file, number)
        else:
            yield from _parquet_rows(file, len(files), packed)


def _shard_rows(path: Path, number: int) -> Iterator[Located]:
    """Samples of a tar shard: neighbours whose names agree up to the first dot. Nothing is unpacked."""
    sample: list[tarfile.TarInfo] = []
    for member in _members(path):
        if sample and _key(member.name) != _key(sample[0].name):
            yield _sample(path, number, sample)
            sample = []
        sample.append(member)
    if sample:
        yield _sample(path, number, sample)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Regular files of a tar whose bytes all lie in it."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every member; a shard may have millions
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"member {member.name} goes beyond the end of the file")
                if member.isreg() and not member.issparse() and not Path(member.name).name.startswith("."):
                    yield member
        if size % TAR_BLOCK:
            raise tarfile.ReadError("it ends inside a block")
    except tarfile.TarError as error:
        raise UsageError(f"{path} is no whole tar file ({error}); copy or download the shard again") from error


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _sample(path: Path, number: int, members: list[tarfile.TarInfo]) -> Located:
    key = _key(members[0].name)
    by_suffix = [(member.name[len(key) :].lower(), member) for member in members]
    texts = [member for suffix, member in by_suffix if suffix == ".json"]
    pictures = [member for suffix, member in by_suffix if suffix in PICTURE_SUFFIXES]
    found = Located(None, Span())
    if len(texts) != 1:
        found.faults.append(("row-shape", f"sample {key} of {path.name} has {len(texts)} .json members; it needs one"))
    else:
        found.row = Span(number, texts[0].offset_data, texts[0].size)
        found.raw = _json_member(path, texts[0], found.faults)
    if pictures:
        found.image = Span(number, pictures[0].offset_data, pictures[0].size)
        found.image_name = pictures[0].name
    if len(pictures) > 1:
        found.faults.append(
            ("several-images", f"sample {key} of {path.name} has {len(pictures)} pictures; one at most")
        )
    if not pictures and isinstance(found.raw, dict) and (found.raw.get("image") or found.raw.get("images")):
        found.faults.append(("image-missing", f"sample {key} of {path.name} names an image and holds no picture"))
        found.image, found.image_name = Span(number), key
    return found


def _json_member(path: Path, member: tarfile.TarInfo, faults: list[Fault]) -> Any:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        text = file.read(member.size)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        faults.append(("row-shape", f"{member.name} of {path.name} is not JSON ({error})"))
        return None


def _parquet_rows(path: Path, packed_number: int, packed: BinaryIO) -> Iterator[Located]:
    """Rows of a parquet file, copied into ``packed``: a row group can only be decoded as a whole."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        with parquet.ParquetFile(path) as file:
            if not {"messages", "conversations"} & set(file.schema_arrow.names):
                raise UsageError(
                    f"{path} has columns {', '.join(file.schema_arrow.names)}; it needs 'messages': give {FORMATS}"
                )
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                for raw in batch.to_pylist():
                    yield _pack(raw, packed_number, packed)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is no whole parquet file ({error}); copy or download it again") from error


def _pack(raw: dict[str, Any], number: int, packed: BinaryIO) -> Located:
    pictures: list[tuple[str | None, bytes]] = []
    plain = _without_bytes(raw, pictures)
    text = json.dumps(plain, ensure_ascii=False, default=str).encode()
    found = Located(plain, Span(number, packed.tell(), len(text)))
    packed.write(text)
    if len(pictures) == 1:
        name, data = pictures[0]
        found.image, found.image_name = Span(number, packed.tell(), len(data)), name or "image"
        packed.write(data)
    return found


def _without_bytes(value: Any, pictures: list[tuple[str | None, bytes]]) -> Any:
    """The value without nulls, and with {"path"} where {"bytes", "path"} or bytes stood; these go to ``pictures``."""
    if isinstance(value, bytes):
        pictures.append((None, value))
        return {"path": f"image {len(pictures)}"}
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        path = value.get("path")
        pictures.append((path if isinstance(path, str) else None, value["bytes"]))
        return {"path": path or f"image {len(pictures)}"}
    if isinstance(value, dict):
        return {key: _without_bytes(one, pictures) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_bytes(one, pictures) for one in value]
    return value
