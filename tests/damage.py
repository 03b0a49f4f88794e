"""Damage to files, drawn at random: in their bytes, in the values of their JSON, in the head of a safetensors file."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

_DEEP = "[" * 100_000 + "]" * 100_000
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, -3, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "a", "no such thing", "../../etc/passwd", "/dev/zero", "x" * 100_000, "\x00", "\ud800", "\x1b[2J", "a\nb",
    "<script>", "(a+)+$", "int8", "float64", "9" * 5000, [], [None], [[]], [1, "a"], {}, {"a": None}, {"": {}},
)  # fmt: skip


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes cut, emptied, repeated, overwritten, or with some inserted or left out."""
    kind = draw.choice(("cut", "flip", "insert", "drop", "repeat", "empty", "noise", "mark", "wide"))
    place = draw.randrange(len(data) + 1)
    length = draw.choice((1, 2, 8, 64, 1024))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 4, 32)) if data else 0):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    return {
        "cut": data[:place],
        "insert": data[:place] + draw.randbytes(length) + data[place:],
        "drop": data[:place] + data[place + length :],
        "repeat": data[:place] + data[place : place + length] * 3 + data[place + length :],
        "empty": b"",
        "noise": draw.randbytes(length),
        "mark": draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\n\n", _DEEP.encode())) + data,
        "wide": data.decode("utf-8", "replace").encode("utf-16"),
    }[kind]


def damaged_json(text: str, draw: random.Random) -> bytes:
    """The JSON text with one to three of its values or keys replaced, left out, or taken from elsewhere in it."""
    whole = [json.loads(text)]
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, key = draw.choice(list(_places(whole)))
        kind = draw.choice(("value", "value", "value", "move", "leave out", "rename", "wrap"))
        if kind == "value":
            place[key] = draw.choice(_VALUES)
        elif kind == "move":
            other, other_key = draw.choice(list(_places(whole)))
            place[key] = json.loads(json.dumps(other[other_key]))
        elif kind == "wrap":
            place[key] = draw.choice(([place[key]], {"a": place[key]}, [place[key]] * 3))
        elif place is not whole:
            value = place.pop(key)
            if kind == "rename" and isinstance(place, dict):
                place[draw.choice(("", "a", "\ud800", "x" * 300, f"{key} "))] = value
    return json.dumps(whole[0], ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def damaged_lines(text: str, draw: random.Random) -> bytes:
    """JSON lines with one of them damaged."""
    lines = [line.encode() for line in text.splitlines()]
    place = draw.randrange(len(lines))
    lines[place] = damaged_json(lines[place].decode(), draw)
    return b"\n".join(lines)


def damaged_safetensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its head damaged as JSON, or a value of a tensor that is not finite."""
    (length,) = struct.unpack("<Q", data[:8])
    head, tensors = data[8 : 8 + length].decode(), data[8 + length :]
    if tensors and draw.random() < 0.2:
        place = 4 * draw.randrange(len(tensors) // 4)
        tensors = tensors[:place] + struct.pack("<f", draw.choice((float("nan"), 1e38, -0.0))) + tensors[place + 4 :]
        return data[: 8 + length] + tensors
    changed = damaged_json(head, draw)
    declared = draw.choice((len(changed),) * 8 + (0, 2**40, 2**63))
    return struct.pack("<Q", declared) + changed + tensors


def damaged(name: str, data: bytes, draw: random.Random) -> bytes:
    """The content of a file, damaged as files of its name can be."""
    by_suffix = {
        "json": lambda: (damaged_lines if data.count(b"\n{") else damaged_json)(data.decode(), draw),
        "jsonl": lambda: damaged_lines(data.decode(), draw),
        "safetensors": lambda: damaged_safetensors(data, draw),
    }
    change = by_suffix.get(name.rpartition(".")[2])
    return change() if change and draw.random() < 0.75 else damaged_bytes(data, draw)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in nested lists and objects."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = range(len(container)) if isinstance(container, list) else list(container)
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (list, dict)):
                left.append(container[key])
    return found
