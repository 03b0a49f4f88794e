"""Paraphrase attack: ask the same in other words, which tells whether the knowledge was unlearned or the question."""

from __future__ import annotations

from ...errors import DataError
from .attack import Attack, AttackResult, AttackSettings, Victims, attacked_rows, check_victims
from .measures import compare_asked


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
    rows = _paraphrased(attacked_rows(victims, settings))
    asked = {"as asked": rows, "in other words": _reworded(rows)}
    return compare_asked("paraphrase", victims, asked, settings)


ATTACK = Attack("paraphrase", "Ask the same questions in other words.", check, run)


def _paraphrased(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row.get("question") is not None and row.get("paraphrased_question") is not None]


def _reworded(rows: list[dict]) -> list[dict]:
    return [{**row, "question": row["paraphrased_question"]} for row in rows]
