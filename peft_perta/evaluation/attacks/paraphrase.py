"""The same asked in other words: was the knowledge unlearned, or the question?"""

from __future__ import annotations

from ...errors import DataError
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Numbers, Victims, attacked_rows, check_victims, compare
from .measures import measured


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a ``paraphrased_question``, or one is no text.
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
    """Of the rows that have one; the same rows are asked as they stand, too."""
    asked = _paraphrased(attacked_rows(victims, settings))

    def measure(subject: Subject, name: str) -> dict[str, Numbers]:
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
