"""What --data names (file, folder or pattern) -> the files in order, and their container, by their first bytes."""

from __future__ import annotations

import glob
import re
import tarfile
from pathlib import Path
from typing import Literal

from bundle.errors import UsageError

Container = Literal["list", "lines", "parquet", "tar"]
FORMATS = (
    'LLaVA rows {"image" (optional), "conversations": [{"from": "human"|"gpt", "value": "..."}]} as a JSON list or '
    'JSON lines; Hugging Face rows {"messages": [{"role": "user"|"assistant", "content": ...}], "images" (optional)} '
    "as a JSON list, JSON lines or parquet; or tar shards (webdataset) of KEY.json beside KEY.jpg or KEY.png, as a "
    "folder or shard-{000000..000123}.tar"
)
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
FOLDER_FILE = "train.json"  # what a data folder of ours holds
SHARD_SUFFIXES = (".tar", ".parquet")
SNIFFED_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


def data_files(path: Path) -> list[Path]:
    """The files of a data set, in the order of their rows.

    Args:
        path: a file; a folder with train.json, or else with .tar or .parquet shards; or a pattern such as
            ``shard-{000000..000123}.tar`` or ``shard-*.tar``.

    Raises:
        UsageError: there is no such file, the folder holds none of these, or a numbered shard is missing.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_folder(path)
    if BRACES.search(str(path)):
        return _numbered(path)
    found = sorted(Path(name) for name in glob.glob(str(path)))
    if found and all(one.is_file() for one in found):
        return found
    raise UsageError(f"data file {path} does not exist; give {FORMATS}; or make one with: alignkd-data make-demo DIR")


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / FOLDER_FILE).is_file():
        return [folder / FOLDER_FILE]
    for suffix in SHARD_SUFFIXES:
        if found := sorted(one for one in folder.iterdir() if one.suffix == suffix and one.is_file()):
            return found
    raise UsageError(
        f"directory {folder} holds no {FOLDER_FILE} and no .tar or .parquet shards; give the data file itself, or run: "
        "alignkd-data make-demo DIR"
    )


def _numbered(path: Path) -> list[Path]:
    names = [str(path)]
    while BRACES.search(names[0]):
        names = [one for name in names for one in _expand(name)]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise UsageError(f"{len(missing)} of {len(names)} files of {path} do not exist, the first is {missing[0]}")
    return [Path(name) for name in names]


def _expand(name: str) -> list[str]:
    match = BRACES.search(name)
    assert match is not None
    first, last = match.groups()
    width = len(first)
    if int(last) < int(first):
        raise UsageError(f"{name}: {match.group()} counts down; write the smaller number first")
    return [f"{name[: match.start()]}{n:0{width}d}{name[match.end() :]}" for n in range(int(first), int(last) + 1)]


def container_of(files: list[Path]) -> Container:
    """How the files hold their rows.

    Raises:
        UsageError: a file is empty, compressed or none of the three formats, or the files differ.
    """
    kinds = {file: _sniff(file) for file in files}
    first = kinds[files[0]]
    other = next((file for file, kind in kinds.items() if kind != first), None)
    if other is not None:
        raise UsageError(f"{files[0]} is {first} and {other} is {kinds[other]}; give files of one format")
    return first


def _sniff(file: Path) -> Container:
    with file.open("rb") as opened:
        head = opened.read(SNIFFED_BYTES)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(f"{file} is compressed ({name}), which has no random access; unpack it first")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or (file.suffix == ".tar" and tarfile.is_tarfile(file)):
        return "tar"
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(b"["):
        return "list"
    if text.startswith(b"{"):
        return "lines"
    what = "is empty" if not text else "is not JSON, parquet or tar"
    raise UsageError(f"{file} {what}; give {FORMATS}")
