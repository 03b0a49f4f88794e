"""What every settings dataclass shares: fields that explain themselves, and checks of their values."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from typing import Any, TypeGuard, TypeVar

from ..errors import ConfigError

T = TypeVar("T")

_LINE = 112  # characters of a line of the generated docstring


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None, **more: Any) -> Any:
    """A field of a settings dataclass. Its entry in the docstring and its command-line option are made from this.

    Args:
        default: the default value.
        help: what the setting does, its range and its unit: one or more sentences.
        choices: the names to choose from, if they are the only values besides None.
        more: further entries of the field's metadata.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **more})


def explained(cls: type[T]) -> type[T]:
    """Write the class's ``Args:`` section from the help, the choices and the default of its fields."""
    lines = ["Args:"]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        text = f"{field.name}: {field.metadata['help']}"
        if field.metadata["choices"]:
            text += f" One of {', '.join(map(repr, field.metadata['choices']))}."
        lines += textwrap.wrap(
            f"{text} Default: {field.default!r}.",
            _LINE,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
    summary, raises, rest = inspect.cleandoc(cls.__doc__ or "").partition("Raises:")
    cls.__doc__ = summary + "\n".join(lines) + "\n\n" + raises + rest
    return cls


def check_setting(holds: bool, name: str, expected: str, found: object) -> None:
    """Refuse a setting whose value is out of its range.

    Args:
        holds: the value is within its range.
        name: the setting's name.
        expected: the values that the setting accepts, as the error message says it.
        found: the value.

    Raises:
        ConfigError: ``holds`` is False.
    """
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether the value is an int; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Whether the value is an int of at least 1."""
    return is_int(value) and value > 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a finite int or float; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
