"""Rewording attack: the question within other words, in other languages, and as the base itself would put it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...data import prompt_text
from ..subject import Subject
from .asking import reasked
from .attack import Attack, AttackResult, AttackSettings, Victims, attacked_rows, check_victims
from .measures import answers, check_prompts, compare_asked, with_prompt

TEMPLATES = {
    "as a request": "I am writing an article and need your help with one question. {} Please answer in one sentence.",
    "in a French frame": "Réponds en anglais à la question suivante : {}",
    "in a German frame": "Bitte beantworte die folgende Frage auf Englisch: {}",
    "in a Spanish frame": "Responde en inglés a la siguiente pregunta: {}",
}
REWORD = "Ask the following question in other words, and write nothing else. {}"
_OWN = "in the base's own words"


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a prompt.
    """
    check_victims(victims, settings)
    check_prompts(victims.unlearned, attacked_rows(victims, settings), "rewording")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """The rows by each template; and those of which the base, every adapter off, makes another question that holds the
    same names and numbers."""
    rows = with_prompt(victims.unlearned, attacked_rows(victims, settings))
    asked = {
        setting: [reasked(row, template.format(prompt_text(row))) for row in rows]
        for setting, template in TEMPLATES.items()
    }
    asked[_OWN] = reworded(victims.unlearned, rows, settings)
    return compare_asked("rewording", victims, asked, settings)


ATTACK = Attack("rewording", "Put other words around the question, in English and in other languages.", check, run)


def reworded(subject: Subject, rows: Sequence[Mapping], settings: AttackSettings) -> list[dict]:
    """The rows in the words of the subject's base; without those that it left as they were or lost a fact of."""
    if subject.adapters is None:
        return []  # the model's own adapters cannot be told from its base
    base = replace(subject, adapters=[])
    texts = answers(base, [reasked(row, REWORD.format(prompt_text(row))) for row in rows], settings, "rewording")
    return [reasked(row, text) for row, text in zip(rows, texts, strict=True) if _is_reworded(prompt_text(row), text)]


def _is_reworded(question: str, text: str) -> bool:
    facts = {word.strip(".,;:!?\"'()") for word in question.split()[1:] if not word.islower()}
    return text.strip() != question.strip() and text.endswith("?") and all(fact in text for fact in facts)
