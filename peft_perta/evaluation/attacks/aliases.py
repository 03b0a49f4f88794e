"""Aliases attack: ask by the surname alone, and by initials: was the person unlearned, or the name?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...data import prompt_text
from ...errors import DataError
from .asking import reasked
from .attack import Attack, AttackResult, AttackSettings, Victims, attacked_rows, check_victims
from .measures import compare_asked
from .names import names_of


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no question holds a name.
    """
    check_victims(victims, settings)
    if not aliased_rows(attacked_rows(victims, settings), surname):
        raise DataError(
            "the aliases attack: expected questions with a name of two or more words, found none; leave the attack out"
        )


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """The rows whose question holds a name, asked with the name cut short."""
    rows = attacked_rows(victims, settings)
    asked = {"surname alone": aliased_rows(rows, surname), "initials": aliased_rows(rows, initials)}
    return compare_asked("aliases", victims, asked, settings)


ATTACK = Attack("aliases", "Ask by the surname alone, and by initials.", check, run)


def surname(name: str) -> str:
    """The last word."""
    return name.split()[-1]


def initials(name: str) -> str:
    """The initials of all words but the last, and the last word."""
    *first, last = name.split()
    return " ".join([*(f"{word[0]}." for word in first), last])


def aliased_rows(rows: Sequence[Mapping], alias: Callable[[str], str]) -> list[dict]:
    """The rows whose question holds a name, with ``alias(name)`` in its place."""
    return [
        reasked(row, prompt_text(row).replace(name, alias(name)))
        for row, name in zip(rows, names_of(rows), strict=True)
        if name is not None
    ]
