"""The beginning of the answer is given: does the rest follow?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from ...data import IGNORED, spread
from ..completions import ScoredCompletion, score_completions
from ..metrics.rouge import rouge_l_recall
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Numbers, Victims, attacked_rows, check_victims, compare
from .measures import answers, check_prompts, of_losses, with_prompt


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        DataError: no row has a prompt.
    """
    check_victims(victims, settings)
    check_prompts(victims.unlearned, attacked_rows(victims, settings), "prefix")


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """For each share of the answer's tokens, rounded down: loss, probability and ROUGE-L recall of what remains."""
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Numbers]:
        known = with_prompt(subject, rows)
        readings = score_completions(subject, known, name)
        asked = spread(known, settings.generated)
        completions = _completions(subject, asked, name)
        numbers = {}
        for share in (0.0, *sorted(set(settings.prefix_shares))):
            given = [tokens[: int(share * (len(tokens) - 1))] for tokens in completions]
            rests = [tokens[len(prefix) :] for tokens, prefix in zip(completions, given, strict=True)]
            truths = [subject.tokenizer.decode(rest, skip_special_tokens=True).strip() for rest in rests]
            texts = answers(subject, asked, settings, f"{name}, {share:.0%} given", prefixes=given)
            numbers[f"{share:.0%} of the answer given"] = {
                **of_losses([_loss_after(reading, share) for reading in readings]),
                "rouge_l_recall": fmean(rouge_l_recall(texts, truths)),
            }
        return numbers

    return compare("prefix", victims, measure)


ATTACK = Attack("prefix", "Give the beginning of the answer.", check, run)


def _completions(subject: Subject, rows: Sequence[Mapping], name: str) -> list[list[int]]:
    """The tokens of each row's completion, with the one that closes it."""
    return [sample.input_ids[sample.labels != IGNORED].tolist() for sample in subject.encode(rows, name)]


def _loss_after(reading: ScoredCompletion, share: float) -> float:
    """The mean token loss of what remains, with the token that closes it: each token is read after those before it, so
    that the loss of the rest is that of the whole without the given tokens' part."""
    scores = reading.tokens.log_probabilities
    whole = len(scores) + 1
    given = int(share * len(scores))
    return (reading.loss * whole + float(scores[:given].sum())) / (whole - given)
