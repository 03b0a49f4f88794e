"""Paraphrase attack: ask the same in other words, which tells whether the knowledge was unlearned or the question."""

from __future__ import annotations

from ...errors import DataError
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import measured


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a ``paraphrased_question``, or one is not a text.
    """
    check_victims(victims, settings)
    asked = _paraphrased(attacked_rows(victims, settings))
    if not asked:
        keys = sorted(map(str, victims.rows[0]))
        raise DataError(
            "the paraphrase attack: expected 'paraphrased_question' beside question and answer in some forget rows, "
            f"found it in none (the first has {keys}); add them, or leave the attack out"
        )
    victims.unlearned.encode(_reworded(asked), "the forget rows with a paraphrased_question")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """The rows with a ``paraphrased_question``, asked by their own question and by the paraphrase."""
    asked = _paraphrased(attacked_rows(victims, settings))

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        return {
            "as asked": measured(subject, asked, settings, name),
            "in other words": measured(subject, _reworded(asked), settings, f"{name}, in other words"),
        }

    return compare("paraphrase", victims, measure)


ATTACK = Attack("paraphrase", "Ask the same questions in other words.", check, run)


def _paraphrased(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row.get("question") is not None and row.get("paraphrased_question") is not None]


def _reworded(rows: list[dict]) -> list[dict]:
    return [{**row, "question": row["paraphrased_question"]} for row in rows]
