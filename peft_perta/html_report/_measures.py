"""What each metric is called in words, which way is better, and how far a value is on the way to the retain-only model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

GROUPS = ("forget", "traces", "retain", "other")


NEAR = 0.1  # of the way from before to the retain-only model: what still counts as at the retain-only model


_NO_DISTANCE = 0.02  # of the scale: before and retain-only model this close cannot tell forgetting from not forgetting


@dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes:
        words: a name for people.
        better: 'lower' or 'higher'; 'near' the ``target``; None where no direction is better.
        group: 'forget' (what must go), 'traces' (whether it shows that it was ever there), 'retain' (what must stay),
            'other'.
        meaning: one sentence.
        scale: its least and largest value; None where it has none.
    """

    words: str
    better: str | None
    group: str
    meaning: str = ""
    target: float | None = None
    scale: tuple[float, float] | None = (0.0, 1.0)

    @property
    def direction(self) -> str:
        """An arrow and words; empty where there is none."""
        if self.better == "near":
            return f"→ best near {self.target:g}"
        return {"lower": "↓ lower is better", "higher": "↑ higher is better"}.get(self.better or "", "")


_PROBABILITY = "Probability of the answer, per token."


_ROUGE = "Share of the true answer's words that come back, in order, in the model's own answer."


_AUC = "How well an attacker tells the forget rows from rows never seen: 1 always, 0.5 a coin toss."


_FALSE = "Probability of wrong answers; a part of the truth ratio."


_UTILITY = "Probability of the true answer among all options."


_CHOICE = "Share of multiple-choice questions answered right; guessing among four gives 0.25."


# The names are open-unlearning's (github.com/locuslab/open-unlearning, configs/eval) where it has one. The first of a
# group that was measured is the page's headline.
MEASURES: dict[str, Measure] = {
    "forget_Q_A_Prob": Measure("Forgotten answers: probability", "lower", "forget", _PROBABILITY),
    "forget_knowmem_ROUGE": Measure("Forgotten knowledge: ROUGE-L", "lower", "forget", _ROUGE),
    "forget_verbmem_ROUGE": Measure("Forgotten texts: ROUGE-L of a continuation", "lower", "forget", _ROUGE),
    "forget_Q_A_ROUGE": Measure("Forgotten answers: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_Q_A_PARA_Prob": Measure("Forgotten answers, reworded: probability", "lower", "forget", _PROBABILITY),
    "forget_Q_A_PARA_ROUGE": Measure("Forgotten questions, reworded: ROUGE-L recall", "lower", "forget", _ROUGE),
    "extraction_strength": Measure(
        "Extraction strength", "lower", "forget", "Share of an answer that the model completes word for word."
    ),
    "exact_memorization": Measure(
        "Exact memorization", "lower", "forget", "Share of the answer's tokens that are the model's first choice."
    ),
    "forget_truth_ratio": Measure(
        "Forget truth ratio", "higher", "forget", "1: true and wrong answers are as likely; 0: one kind stands out."
    ),
    "forget_Truth_Ratio": Measure(
        "Forget truth ratio", "higher", "forget", "1: true and wrong answers are as likely; 0: one kind stands out."
    ),
    "forget_level1_ROUGE": Measure("Forgotten subject, cloze: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_level2_ROUGE": Measure("Forgotten subject, questions: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_level3_ROUGE": Measure("Forgotten subject, attacked: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_loss": Measure("Forget rows: loss", "higher", "forget", "Nats per token.", scale=None),
    "forget_quality": Measure(
        "Forget quality", "higher", "traces",
        "A p-value: above 0.05, the truth ratios cannot be told from those of a model that never saw the rows.",
    ),
    "privleak": Measure(
        "Privacy leakage", "near", "traces", "Below 0 the rows look known, above 0 they are avoided too visibly.",
        target=0.0, scale=(-100.0, 100.0),
    ),
    "mia_loss": Measure("Membership by loss", "near", "traces", _AUC, target=0.5),
    "mia_zlib": Measure("Membership by loss over compressed size", "near", "traces", _AUC, target=0.5),
    "mia_min_k": Measure("Membership by min-k", "near", "traces", _AUC, target=0.5),
    "mia_min_k_plus_plus": Measure("Membership by min-k++", "near", "traces", _AUC, target=0.5),
    "mia_reference": Measure("Membership against a retain-only model's loss", "near", "traces", _AUC, target=0.5),
    "mia_gradnorm": Measure("Membership by gradient norm", "near", "traces", _AUC, target=0.5),
    "model_utility": Measure(
        "Model utility", "higher", "retain", "One number for all that must stay: a harmonic mean of nine measures."
    ),
    "retain_Q_A_Prob": Measure("Retained answers: probability", "higher", "retain", _PROBABILITY),
    "retain_knowmem_ROUGE": Measure("Retained knowledge: ROUGE-L", "higher", "retain", _ROUGE),
    "retain_Q_A_ROUGE": Measure("Retained answers: ROUGE-L recall", "higher", "retain", _ROUGE),
    "retain_Q_A_PARA_Prob": Measure("Retained answers, reworded: probability", "higher", "retain", _PROBABILITY),
    "retain_Truth_Ratio": Measure(
        "Retain truth ratio", "higher", "retain", "How far true answers are likelier than wrong ones."
    ),
    "retain_extraction_strength": Measure(
        "Retained texts: extraction strength", "higher", "retain", "The same of rows that must stay."
    ),
    "neighbor_level1_ROUGE": Measure("Neighbouring subjects, cloze: ROUGE-L recall", "higher", "retain", _ROUGE),
    "neighbor_level2_ROUGE": Measure("Neighbouring subjects, questions: ROUGE-L recall", "higher", "retain", _ROUGE),
    "ra_Q_A_Prob_normalised": Measure("Real authors: probability among options", "higher", "retain", _UTILITY),
    "ra_Q_A_ROUGE": Measure("Real authors: ROUGE-L recall", "higher", "retain", _ROUGE),
    "ra_Truth_Ratio": Measure(
        "Real authors: truth ratio", "higher", "retain", "How far true answers are likelier than wrong ones."
    ),
    "wf_Q_A_Prob_normalised": Measure("World facts: probability among options", "higher", "retain", _UTILITY),
    "wf_Q_A_ROUGE": Measure("World facts: ROUGE-L recall", "higher", "retain", _ROUGE),
    "wf_Truth_Ratio": Measure(
        "World facts: truth ratio", "higher", "retain", "How far true answers are likelier than wrong ones."
    ),
    "ra_Q_A_Prob": Measure("Real authors: probability", "higher", "retain", _PROBABILITY),
    "wf_Q_A_Prob": Measure("World facts: probability", "higher", "retain", _PROBABILITY),
    "forget_Q_A_gibberish": Measure(
        "Answers to forgotten questions: fluency", "higher", "retain", "Whether a classifier takes them for language."
    ),
    "retain_loss": Measure("Retain rows: loss", "lower", "retain", "Nats per token.", scale=None),
    "general_loss": Measure("General rows: loss", "lower", "retain", "Nats per token.", scale=None),
    "choices_acc": Measure("Multiple choice: accuracy", None, "other", f"Higher, unless it must go. {_CHOICE}"),
    "forget_Q_A_PERT_Prob": Measure("Forgotten questions, wrong answers: probability", None, "other", _FALSE),
    "retain_Q_A_PERT_Prob": Measure("Retained questions, wrong answers: probability", None, "other", _FALSE),
    "ra_Q_A_PERT_Prob": Measure("Real authors, wrong answers: probability", None, "other", _FALSE),
    "wf_Q_A_PERT_Prob": Measure("World facts, wrong answers: probability", None, "other", _FALSE),
}  # fmt: skip


# Metrics of which there are many, by the shape of their names: RWKU's ways of asking, questions with choices, and the
# general benchmarks of lm-eval ('task/metric').
_FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    ("forget_level3_*_ROUGE", "lower", "forget", _ROUGE),
    ("choices_acc_wmdp*", "lower", "forget", _CHOICE),
    ("choices_acc_mmlu*", "higher", "retain", _CHOICE),
    ("wmdp*/acc", "lower", "forget", _CHOICE),
    *((f"{task}/{metric}", "higher", "retain", "A general benchmark.")
      for task in ("mmlu*", "hellaswag", "arc_*", "winogrande", "piqa", "boolq", "openbookqa", "gsm8k",
                   "truthfulqa_mc*", "triviaqa", "lambada*")
      for metric in ("acc*", "exact_match*")),
)  # fmt: skip


def measure_of(metric: str) -> Measure:
    """Its row of the table; else its own name with its family's direction; an unknown metric has none."""
    found = MEASURES.get(metric)
    if found is None:
        for pattern, better, group, meaning in _FAMILIES:
            if fnmatchcase(metric, pattern):
                return Measure(metric, better, group, meaning)
    return found or Measure(metric, None, "other", scale=None)


def ordered(metrics: set[str], group: str) -> list[str]:
    """Those of the group, in the table's order, unknown ones last by name."""
    order = {name: place for place, name in enumerate(MEASURES)}
    found = [metric for metric in metrics if measure_of(metric).group == group]
    return sorted(found, key=lambda metric: (order.get(metric, len(order)), metric))


@dataclass(frozen=True)
class Standing:
    """Where a value lies on the way from before to the retain-only model.

    Attributes:
        kind: 'near' the retain-only model, 'past' it, 'part' of the way, 'unmoved' (or moved away from it).
        share: of the way that was gone; 1 is at the retain-only model.
    """

    kind: str
    share: float

    @property
    def words(self) -> str:
        return {
            "near": "near the retain-only model",
            "past": "past the retain-only model",
            "part": f"{self.share:.0%} of the way",
            "unmoved": "moved away" if self.share < -NEAR else "hardly moved",
        }[self.kind]


def standing(measure: Measure, before: float | None, after: float | None, retain_only: float | None) -> Standing | None:
    """None where a value is missing or not finite, or where before and retain-only model hardly differ."""
    if (
        before is None
        or after is None
        or retain_only is None
        or not all(map(math.isfinite, (before, after, retain_only)))
    ):
        return None
    low, high = measure.scale or sorted((before, retain_only))
    if before == retain_only or abs(before - retain_only) < _NO_DISTANCE * (high - low):
        return None
    share = (before - after) / (before - retain_only)
    kind = "past" if share > 1 + NEAR else "near" if share >= 1 - NEAR else "part" if share > NEAR else "unmoved"
    return Standing(kind, share)


def lost_share(measure: Measure, before: float | None, after: float | None) -> float | None:
    """How much of a retained quantity went, as a share of what was there; below 0 where it grew; None where it has no
    such share."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return None
    if measure.better != "higher" or before <= 0:
        return None
    return (before - after) / before
