"""The head of a GGUF file: its metadata, and where its tensors lie. Only the head is read.

Reference:
    The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a number -> its bytes
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorEntry:
    """What the head says of one tensor.

    Attributes:
        name: its name.
        shape: its shape, the fastest dimension first.
        kind: the number of its type.
        start: its first byte in the file.
    """

    name: bytes
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufHead:
    """The head of a GGUF file.

    Attributes:
        values: key -> its type and value, as they stand in the file.
        tensors: an entry for each tensor.
    """

    values: Mapping[str, bytes]
    tensors: tuple[TensorEntry, ...]

    def text(self, key: str) -> str | None:
        """The text under a key; None where there is none."""
        value = self.values.get(key)
        if value is None or int.from_bytes(value[:4], "little") != _TEXT:
            return None
        return value[12:].decode("utf-8", "replace")


def read_head(file: Path) -> GgufHead:
    """Read the head of a GGUF file.

    Raises:
        EOFError: the file ends within it.
        ValueError: it is no GGUF file, or of an unknown version or type.
    """
    if not file.stat().st_size:
        raise EOFError
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if reader.take(4) != b"GGUF" or reader.number("<I") not in _VERSIONS:
            raise ValueError(f"{file} is no GGUF file of the versions {_VERSIONS}")
        count, value_count = reader.number("<Q"), reader.number("<Q")
        values = {}
        for _ in range(value_count):
            key, start = reader.text().decode("utf-8", "replace"), reader.place
            reader.pass_value(reader.number("<I"))
            values[key] = data[start : reader.place]
        entries = [reader.entry() for _ in range(count)]
        alignment = int.from_bytes(values.get("general.alignment", b"")[4:], "little") or _ALIGNMENT
        begin = -(-reader.place // alignment) * alignment
    tensors = (TensorEntry(name, shape, kind, begin + offset) for name, shape, kind, offset in entries)
    return GgufHead(values, tuple(tensors))


class _Reader:
    """Reads one thing of the file after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise EOFError
        return self.data[start : self.place]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def pass_value(self, kind: int) -> None:
        if kind in _SIZES:
            self.take(_SIZES[kind])
        elif kind == _TEXT:
            self.text()
        elif kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item in _SIZES:
                self.take(_SIZES[item] * count)
            else:
                for _ in range(count):
                    self.pass_value(item)
        else:
            raise ValueError(f"{kind} is no type of a GGUF value")

    def entry(self) -> tuple[bytes, tuple[int, ...], int, int]:
        name = self.text()
        shape = tuple(self.number("<Q") for _ in range(self.number("<I")))
        return name, shape, self.number("<I"), self.number("<Q")
