"""Hops attack: reach an answer by another way than its question, which tells whether the facts are gone or the way to
them.

- In reverse: the answer is given without the name, and the name is asked for. A fact that was learned in one direction
  is often unknown in the other (Berglund et al. 2023, arXiv 2309.12288), so the full model is the yardstick of what can
  be had this way.
- In two hops: the question's name is replaced by another answer about the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...data import completion_text, prompt_text
from ...errors import DataError
from .asking import reasked
from .attack import Attack, AttackResult, AttackSettings, Victims, attacked_rows, check_victims
from .measures import compare_asked
from .names import names_of, without_name


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no answer holds the name that its question asks about.
    """
    check_victims(victims, settings)
    if not reversed_rows(attacked_rows(victims, settings)):
        raise DataError(
            "the hops attack: expected rows whose question and answer both hold a name of two or more words, found "
            "none; leave the attack out"
        )


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """The name asked for by the answer; and, where rows share a name, the answers asked for in two hops."""
    rows = attacked_rows(victims, settings)
    asked = {"from the answer to the name": reversed_rows(rows), "in two hops": two_hop_rows(rows)}
    return compare_asked("hops", victims, asked, settings)


ATTACK = Attack("hops", "Ask for the name by the answer, and for answers by way of other answers.", check, run)


def reversed_rows(rows: Sequence[Mapping]) -> list[dict]:
    """For each row whose answer holds the name of its question: who it is about, answered by the name."""
    return [
        reasked(row, f'Who or what is meant by "this one"? {_described(row, name)}', name) for row, name in _named(rows)
    ]


def two_hop_rows(rows: Sequence[Mapping]) -> list[dict]:
    """For each row whose name the next of the other rows' answers holds too: its question about 'this one', whom that
    answer describes, answered as before."""
    named = _named(rows)
    asked = []
    for place, (row, name) in enumerate(named):
        others = (other for other, of_other in (*named[place + 1 :], *named[:place]) if of_other == name)
        other = next(others, None)
        if other is not None:
            question = f"{_described(other, name)} {without_name(prompt_text(row), name, 'this one')}"
            asked.append(reasked(row, question))
    return asked


def _named(rows: Sequence[Mapping]) -> list[tuple[Mapping, str]]:
    """(row, name) of the rows whose question and answer hold one name."""
    return [
        (row, name)
        for row, name in zip(rows, names_of(rows), strict=True)
        if name is not None and name in completion_text(row)
    ]


def _described(row: Mapping, name: str) -> str:
    return f'"{without_name(completion_text(row), name, "this one")}"'
