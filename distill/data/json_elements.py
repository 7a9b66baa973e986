"""JSON list or JSON lines, streamed -> every element with its byte range; no more than one element is held.

The parser is the standard library's: ``raw_decode`` says where an element ends. ijson, the usual streaming parser,
gives no byte offsets, and without them a row could not be read again without a copy of the file. The window over the
file is decoded as Latin-1, so that a character is a byte: JSON's own characters are ASCII, and UTF-8 never uses ASCII
bytes for parts of others. Elements with other characters are decoded a second time, as UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bundle.errors import UsageError

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_BYTES = 1 << 28  # a longer one is a string that is never closed, not a conversation
TAIL = 16  # a parser error this close to the window's end may be a literal, a number or an escape that was cut
NUMBER_TAIL = 3  # what may be left over of a number that was cut behind its integer part, such as "e+", and one more
DELIMITERS = tuple(",] \t\n\r")
BOM = b"\xef\xbb\xbf"
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Element:
    """A value and its bytes ``[start, start + size)`` in the file."""

    start: int
    size: int
    value: Any


def list_elements(path: Path) -> Iterator[Element]:
    """Elements of the JSON list in ``path``, in order.

    Raises:
        UsageError: the file is no JSON list, or bytes follow the list.
    """
    with path.open("rb", buffering=0) as file:
        window = _Window(path, file)
        if window.next_character() != "[":
            raise window.problem("a list must begin with '['")
        window.skip()
        if window.next_character() == "]":
            window.skip()
        else:
            yield from _until_end(window)
        if window.next_character():
            raise window.problem("more follows the list")


def _until_end(window: _Window) -> Iterator[Element]:
    while True:
        if not window.next_character():
            raise window.problem("the list is not closed")
        yield window.element()
        separator = window.next_character()
        if separator not in (",", "]"):
            raise window.problem("expected ',' or ']'" if separator else "the list is not closed")
        window.skip()
        if separator == "]":
            return


def line_elements(path: Path) -> Iterator[Element]:
    """One element a line; blank lines are passed over.

    Raises:
        UsageError: a line is not JSON.
    """
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ELEMENT_BYTES), b""), 1):
            text = line.removeprefix(BOM) if not start else line
            if text.strip():
                try:
                    yield Element(start + len(line) - len(text), len(text), json.loads(text))
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{path} line {number} is not JSON ({error})") from error
            start += len(line)


class _Window:
    """A piece of the file that slides forward: ``text[at]`` is the byte ``base + at``."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._text, self._base, self._at = "", 0, 0
        while len(self._text) < len(BOM) and self._more():
            pass
        if self._text.startswith(BOM.decode("latin-1")):
            self._at = len(BOM)

    def problem(self, what: str, at: int | None = None) -> UsageError:
        """The one line for a fault at a position of the window."""
        return UsageError(f"{self._path} is not JSON ({what}: byte {self._base + (self._at if at is None else at)})")

    def next_character(self) -> str:
        """The next one that is no white space; '' at the end of the file."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Step over the character that ``next_character`` gave."""
        self._at += 1

    def element(self) -> Element:
        """The value that begins at the position."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.problem("nested too deeply") from error
            except ValueError as error:
                what, at = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else (str(error), None)
                problem = self.problem(what, at)  # before the window slides
                if not self._may_be_cut(error) or not self._more():
                    raise problem from error
                continue
            behind, size = self._text[end : end + NUMBER_TAIL], end - self._at
            if len(behind) == NUMBER_TAIL or behind[:1] in DELIMITERS or not self._more():
                return self._taken(value, self._at + size)

    def _taken(self, value: Any, end: int) -> Element:
        start, piece = self._base + self._at, self._text[self._at : end]
        if not piece.isascii():
            try:
                value = json.loads(piece.encode("latin-1").decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self.problem(str(error)) from error
        self._at = end
        return Element(start, len(piece), value)

    def _may_be_cut(self, error: ValueError) -> bool:
        if not isinstance(error, json.JSONDecodeError) or len(self._text) - self._at > MAX_ELEMENT_BYTES:
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - TAIL

    def _more(self) -> bool:
        """Drop what was read and append at least as much as is left, so that a long element costs linear time."""
        rest = self._text[self._at :]
        block = self._file.read(max(CHUNK_BYTES, len(rest)))
        self._text, self._base, self._at = rest + block.decode("latin-1"), self._base + self._at, 0
        return bool(block)
