"""What several commands take: a base, adapters, rows; and how their text is read."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence

from ..errors import ConfigError
from ..model import check_adapter_files, load_base

HTML_REPORT_NAME = "report.html"


ROWS_HELP = "JSON lines of {question, answer}, {prompt, completion}, {messages} or {text}"


def add_command(
    commands, name: str, run: Callable, text: str, begun: Callable[[argparse.Namespace], str] | None = None
) -> argparse.ArgumentParser:
    """``begun``: what is there where an interrupted run can be gone on with."""
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run, begun=begun)
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="NAME", help="base model: a hub name or a directory")
    command.add_argument("--revision", help="revision of a hub model")
    command.add_argument("--four-bit", action="store_true", help="quantise the base to NF4 (QLoRA)")
    command.add_argument(
        "--device-map", choices=["auto"], help="spread the layers over all GPUs and the host (default: one GPU)"
    )


def load_model(options: argparse.Namespace):
    return load_base(options.model, four_bit=options.four_bit, revision=options.revision, device_map=options.device_map)


def check_distinct(directories: Iterable[str]) -> None:
    """Refuse one adapter under two names: its delta would count twice.

    Raises:
        ConfigError: two of them are one directory.
    """
    seen: dict[str, str] = {}
    for directory in directories:
        first = seen.setdefault(os.path.realpath(directory), directory)
        if first is not directory:
            raise ConfigError(f"{directory} is given twice, expected each adapter once: its delta would be added twice")


def seed_of(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):  # what NumPy's generator takes
        raise argparse.ArgumentTypeError(f"expected an int from 0 to {2**32 - 1}, found {text!r}")
    return int(text)


def strengths_of(texts: Sequence[str]) -> dict[str, float]:
    """DIR[:STRENGTH] -> strength."""
    parts: dict[str, float] = {}
    for text in texts:
        directory, colon, strength = text.rpartition(":")
        if not colon or os.path.isdir(text):
            directory, strength = text, "1"
        try:
            value = float(strength)
        except ValueError:
            raise ConfigError(f"expected DIR or DIR:STRENGTH with a number, found {text!r}") from None
        if directory in parts or not math.isfinite(value):
            what = "is given twice" if directory in parts else f"has the strength {value}, expected a finite one"
            raise ConfigError(f"{directory} {what}")
        parts[directory] = value
    for directory in parts:
        check_adapter_files(directory)
    return parts
