"""The fields of a settings dataclass as options, and the options as settings.

A field's annotation gives the type of its option; its metadata gives the ``help`` and, if there are any, the
``choices``. An option that is not given leaves the field at its default.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from ._options import flag

T = TypeVar("T")


def add_settings(parser: argparse.ArgumentParser, settings: type, title: str) -> None:
    """Add an option for each field of the dataclass, in a section of the help.

    Raises:
        TypeError: no option is known for a field's annotation.
    """
    section = parser.add_argument_group(title)
    annotations = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        annotation = annotations[field.name]
        name = flag(field.name)
        action: dict[str, Any]
        if _without_none(annotation) == list[str]:
            name = name.removesuffix("s")  # one option for each value
            action = {"action": "append", "metavar": "TEXT"}
        elif _without_none(annotation) == str | tuple[str, ...]:
            action = {"nargs": "+", "metavar": "NAMES"}
        elif _without_none(annotation) is bool:
            action = {"action": argparse.BooleanOptionalAction}
        else:
            choices = field.metadata.get("choices")
            reader = _reader(annotation, f"{settings.__name__}.{field.name}")
            action = {"type": reader, "choices": choices and list(choices)}
        section.add_argument(name, dest=field.name, default=argparse.SUPPRESS, help=_help(field), **action)


def read_settings(settings: type[T], options: argparse.Namespace) -> T:
    """The settings that the options give.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """
    names = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    return settings(**{name: value for name, value in vars(options).items() if name in names})


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"].replace("%", "%%")
    return text if field.default is None else f"{text} (default: {field.default})"


def _without_none(annotation: Any) -> Any:
    """The annotation without ``None``: an option is not given at all instead."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
    return functools.reduce(operator.or_, members)


def _int_or_float(text: str) -> int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"expected an int or a float, found {text!r}")


def _float_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_READERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    int | float: _int_or_float,  # an int stays an int: the rank 1 is no share of the energy
    float | str: _float_or_text,
    int | str: str,  # a size such as 10GiB, kept as it was written
}


def _reader(annotation: Any, field: str) -> Callable[[str], Any]:
    reader = _READERS.get(_without_none(annotation))
    if reader is None:
        expected = ", ".join(getattr(known, "__name__", str(known)) for known in _READERS)
        raise TypeError(
            f"{field}: expected an annotation of {expected}, bool, list[str] or str | tuple[str, ...], found "
            f"{annotation}"
        )
    return reader
