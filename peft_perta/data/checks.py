"""Checks of a setting's value, shared by every settings dataclass."""

from __future__ import annotations

import math
from typing import TypeGuard

from ..errors import ConfigError


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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
