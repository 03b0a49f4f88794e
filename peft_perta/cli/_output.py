"""What a command checks of the places that it writes to, before it computes anything."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ..data import check_output
from ..errors import OutputError
from ._options import flag

_PLACES = ("output", "json")  # options that name what is written


def check_output_of(options: argparse.Namespace, marker: str, *, grows: bool = False) -> Path:
    """Check ``options.output`` as ``check_output`` does, and that no input lies in it.

    Raises:
        OutputError: the directory may not be written, or an input is or lies in it.
    """
    output = check_output(options.output, marker, grows=grows)
    own = output.resolve()
    for name, given, path in _inputs(options):
        if path.resolve() == own or own in path.resolve().parents:
            raise OutputError(
                f"{flag(name)}: {given} is in the output {options.output}, which will be written anew; choose another "
                "output"
            )
    return output


def _inputs(options: argparse.Namespace) -> Iterator[tuple[str, str, Path]]:
    """(option, its value, path) of every value that names something on the disk: PATH, NAME=PATH, KIND:PATH,
    PATH:STRENGTH or PATH[SPLIT]?COLUMNS."""
    for name, values in vars(options).items():
        for given in values if isinstance(values, (list, tuple)) else [values]:
            if name in (*_PLACES, "command_line") or not isinstance(given, str):
                continue
            place = re.split(r"[?\[]", given, maxsplit=1)[0]
            names = {given, place, given.rpartition(":")[0], place.rpartition(":")[0], given.partition("=")[2]}
            names.add(given.partition(":")[2])
            yield from ((name, given, Path(text)) for text in sorted(names - {""}) if _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False
