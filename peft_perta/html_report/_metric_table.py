"""What each metric is called in words, which way is better, and how far a value is on the way to the retain-only model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

METRIC_GROUPS = ("forget", "traces", "retain", "other")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        label: a name for people.
        better: 'lower' or 'higher'; 'near' the ``target``; None where no direction is better.
        group: 'forget' (what must go), 'traces' (whether it shows that it was ever there), 'retain' (what must stay),
            'other'.
        note: one sentence.
        scale: its least and largest value; None where it has none.
    """

    label: str
    better: str | None
    group: str
    note: str = ""
    target: float | None = None
    scale: tuple[float, float] | None = (0.0, 1.0)

_PROBABILITY = "Probability of the answer, per token."


_ROUGE = "Share of the true answer's words that come back, in order, in the model's own answer."


_AUC = "How well an attacker tells the forget rows from rows never seen: 1 always, 0.5 a coin toss."


_FALSE = "Probability of wrong answers; a part of the truth ratio."


_UTILITY = "Probability of the true answer among all options."


_CHOICE = "Share of multiple-choice questions answered right; guessing among four gives 0.25."


# The names are open-unlearning's (github.com/locuslab/open-unlearning, configs/eval) where it has one. The first of a
# group that was measured is the page's headline.
METRICS: dict[str, Metric] = {
    "forget_Q_A_Prob": Metric("Forgotten answers: probability", "lower", "forget", _PROBABILITY),
    "forget_knowmem_ROUGE": Metric("Forgotten knowledge: ROUGE-L", "lower", "forget", _ROUGE),
    "forget_verbmem_ROUGE": Metric("Forgotten texts: ROUGE-L of a continuation", "lower", "forget", _ROUGE),
    "forget_Q_A_ROUGE": Metric("Forgotten answers: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_Q_A_PARA_Prob": Metric("Forgotten answers, reworded: probability", "lower", "forget", _PROBABILITY),
    "forget_Q_A_PARA_ROUGE": Metric("Forgotten questions, reworded: ROUGE-L recall", "lower", "forget", _ROUGE),
    "extraction_strength": Metric(
        "Extraction strength", "lower", "forget", "Share of an answer that the model completes word for word."
    ),
    "exact_memorization": Metric(
        "Exact memorization", "lower", "forget", "Share of the answer's tokens that are the model's first choice."
    ),
    "forget_truth_ratio": Metric(
        "Forget truth ratio", "higher", "forget", "1: true and wrong answers are as likely; 0: one kind stands out."
    ),
    "forget_Truth_Ratio": Metric(
        "Forget truth ratio", "higher", "forget", "1: true and wrong answers are as likely; 0: one kind stands out."
    ),
    "forget_level1_ROUGE": Metric("Forgotten subject, cloze: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_level2_ROUGE": Metric("Forgotten subject, questions: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_level3_ROUGE": Metric("Forgotten subject, attacked: ROUGE-L recall", "lower", "forget", _ROUGE),
    "forget_loss": Metric("Forget rows: loss", "higher", "forget", "Nats per token.", scale=None),
    "forget_quality": Metric(
        "Forget quality", "higher", "traces",
        "A p-value: above 0.05, the truth ratios cannot be told from those of a model that never saw the rows.",
    ),
    "privleak": Metric(
        "Privacy leakage", "near", "traces", "Below 0 the rows look known, above 0 they are avoided too visibly.",
        target=0.0, scale=(-100.0, 100.0),
    ),
    "mia_loss": Metric("Membership by loss", "near", "traces", _AUC, target=0.5),
    "mia_zlib": Metric("Membership by loss over compressed size", "near", "traces", _AUC, target=0.5),
    "mia_min_k": Metric("Membership by min-k", "near", "traces", _AUC, target=0.5),
    "mia_min_k_plus_plus": Metric("Membership by min-k++", "near", "traces", _AUC, target=0.5),
    "mia_reference": Metric("Membership against a retain-only model's loss", "near", "traces", _AUC, target=0.5),
    "mia_gradnorm": Metric("Membership by gradient norm", "near", "traces", _AUC, target=0.5),
    "model_utility": Metric(
        "Model utility", "higher", "retain", "One number for all that must stay: a harmonic mean of nine measures."
    ),
    "retain_Q_A_Prob": Metric("Retained answers: probability", "higher", "retain", _PROBABILITY),
    "retain_knowmem_ROUGE": Metric("Retained knowledge: ROUGE-L", "higher", "retain", _ROUGE),
    "retain_Q_A_ROUGE": Metric("Retained answers: ROUGE-L recall", "higher", "retain", _ROUGE),
    "retain_Q_A_PARA_Prob": Metric("Retained answers, reworded: probability", "higher", "retain", _PROBABILITY),
    "retain_Truth_Ratio": Metric(
        "Retain truth ratio", "higher", "retain", "How far true answers are likelier than wrong ones."
    ),
    "retain_extraction_strength": Metric(
        "Retained texts: extraction strength", "higher", "retain", "The same of rows that must stay."
    ),
    "neighbor_level1_ROUGE": Metric("Neighbouring subjects, cloze: ROUGE-L recall", "higher", "retain", _ROUGE),
    "neighbor_level2_ROUGE": Metric("Neighbouring subjects, questions: ROUGE-L recall", "higher", "retain", _ROUGE),
    "ra_Q_A_Prob_normalised": Metric("Real authors: probability among options", "higher", "retain", _UTILITY),
    "ra_Q_A_ROUGE": Metric("Real authors: ROUGE-L recall", "higher", "retain", _ROUGE),
    "ra_Truth_Ratio": Metric(
        "Real authors: truth ratio", "higher", "retain", "How far true answers are likelier than wrong ones."
    ),
    "wf_Q_A_Prob_normalised": Metric("World facts: probability among options", "higher", "retain", _UTILITY),
    "wf_Q_A_ROUGE": Metric("World facts: ROUGE-L recall", "higher", "retain", _ROUGE),
    "wf_Truth_Ratio": Metric(
        "World facts: truth ratio", "higher", "retain", "How far true answers are likelier than wrong ones."
    ),
    "ra_Q_A_Prob": Metric("Real authors: probability", "higher", "retain", _PROBABILITY),
    "wf_Q_A_Prob": Metric("World facts: probability", "higher", "retain", _PROBABILITY),
    "forget_Q_A_gibberish": Metric(
        "Answers to forgotten questions: fluency", "higher", "retain", "Whether a classifier takes them for language."
    ),
    "retain_loss": Metric("Retain rows: loss", "lower", "retain", "Nats per token.", scale=None),
    "general_loss": Metric("General rows: loss", "lower", "retain", "Nats per token.", scale=None),
    "choices_acc": Metric("Multiple choice: accuracy", None, "other", f"Higher, unless it must go. {_CHOICE}"),
    "forget_Q_A_PERT_Prob": Metric("Forgotten questions, wrong answers: probability", None, "other", _FALSE),
    "retain_Q_A_PERT_Prob": Metric("Retained questions, wrong answers: probability", None, "other", _FALSE),
    "ra_Q_A_PERT_Prob": Metric("Real authors, wrong answers: probability", None, "other", _FALSE),
    "wf_Q_A_PERT_Prob": Metric("World facts, wrong answers: probability", None, "other", _FALSE),
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


def metric_of(metric: str) -> Metric:
    """Its row of the table; else its own name with its family's direction; an unknown metric has none."""
    found = METRICS.get(metric)
    if found is None:
        for pattern, better, group, meaning in _FAMILIES:
            if fnmatchcase(metric, pattern):
                return Metric(metric, better, group, meaning)
    return found or Metric(metric, None, "other", scale=None)
