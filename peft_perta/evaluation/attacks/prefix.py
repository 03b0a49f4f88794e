"""Prefix attack: give the beginning of the answer and measure the rest."""

from __future__ import annotations

from ...data import spread
from ..completions import ScoredCompletion, score_completions
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import answer_tokens, answered, answers, check_prompts, of_losses, recalls_of, with_prompt


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a prompt.
    """
    check_victims(victims, settings)
    check_prompts(victims.unlearned, attacked_rows(victims, settings), "prefix")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """For each share of the answer's tokens (rounded down): loss, probability and ROUGE-L recall of the rest."""
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        answerable = with_prompt(subject, rows)
        scored = score_completions(subject, answerable, name)
        asked = spread(answerable, settings.generated)
        whole = answer_tokens(subject, asked, name)
        numbers = {}
        for share in (0.0, *sorted(set(settings.prefix_shares))):
            given = [tokens[: int(share * len(tokens))] for tokens in whole]
            rests = [tokens[len(prefix) :] for tokens, prefix in zip(whole, given, strict=True)]
            truths = [subject.tokenizer.decode(rest, skip_special_tokens=True).strip() for rest in rests]
            texts = answers(subject, asked, settings, f"{name}, {share:.0%} given", prefixes=given)
            said = answered(asked, texts, truths)
            values = {**of_losses([_loss_after(row, share) for row in scored]), "rouge_l_recall": recalls_of(said)}
            numbers[f"{share:.0%} of the answer given"] = Measured(values, said)
        return numbers

    return compare("prefix", victims, measure)


ATTACK = Attack("prefix", "Give the beginning of the answer.", check, run)


def _loss_after(scored: ScoredCompletion, share: float) -> float:
    """The mean token loss of the rest of the answer, with the closing tokens."""
    given = int(share * len(scored.tokens.log_probabilities))
    return -float(scored.whole.log_probabilities[scored.words.start + given :].mean())
