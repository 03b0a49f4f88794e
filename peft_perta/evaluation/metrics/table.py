"""The metrics table: every metric that we name, and families of metrics that share the form of their names.

To add a metric: a file with its functions, a row here, a row in tests/tables.py.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .forget_quality import aggregate_forget_quality, has_forget_truth_ratio
from .membership import MEMBERSHIP_PARTS, PRIVACY_ATTACK, aggregate_membership, aggregate_privacy
from .metric import Metric, mean_of
from .truth_ratio import aggregate_truth_ratio, follows_from_losses, logged_truth_ratios
from .utility import UTILITY_PARTS, aggregate_model_utility, aggregate_normalised

_PROBABILITY = "Probability of the answer, per token."
_ROUGE = "Share of the true answer's words that come back, in order, in the model's own answer."
_AUC = "How well an attacker tells the forget rows from rows never seen: 1 always, 0.5 a coin toss."
_FALSE = "Probability of wrong answers; a part of the truth ratio."
_OPTIONS = "Probability of the true answer among all options."
_CHOICE = "Share of multiple-choice questions answered right; guessing among four gives 0.25."
_TRUTH = "How far true answers are likelier than wrong ones."
_FORGET_TRUTH = "1: true and wrong answers are as likely; 0: one kind stands out."


def _probability(label: str, better, group: str, note: str = _PROBABILITY) -> Metric:
    return Metric(label, better, group, note, aggregate=mean_of("prob"))


def _recall(label: str, better, group: str) -> Metric:
    return Metric(label, better, group, _ROUGE, aggregate=mean_of("rougeL_recall"))


def _f1(label: str, better, group: str) -> Metric:
    return Metric(label, better, group, _ROUGE, aggregate=mean_of("rougeL_f1"))


def _score(label: str, better, group: str, note: str) -> Metric:
    return Metric(label, better, group, note, aggregate=mean_of("score"))


def _truth(label: str, better, group: str, note: str, split: str) -> Metric:
    return Metric(label, better, group, note, aggregate=aggregate_truth_ratio, follows_from=follows_from_losses(split))


def _options(label: str, split: str) -> Metric:
    needed = {f"{split}_Q_A_Prob", f"{split}_Q_A_PERT_Prob"}
    return Metric(
        label, "higher", "retain", _OPTIONS, aggregate=aggregate_normalised, follows_from=lambda names: needed <= names
    )


def _membership(label: str) -> Metric:
    return Metric(label, "near", "traces", _AUC, target=0.5, aggregate=aggregate_membership, parts=MEMBERSHIP_PARTS)


# The names are open-unlearning's (github.com/locuslab/open-unlearning, configs/eval) where it has one. Reports show the
# metrics of a group in this order; the first that was measured is the group's headline.
METRICS: dict[str, Metric] = {
    "forget_Q_A_Prob": _probability("Forgotten answers: probability", "lower", "forget"),
    "forget_knowmem_ROUGE": _f1("Forgotten knowledge: ROUGE-L", "lower", "forget"),
    "forget_verbmem_ROUGE": _f1("Forgotten texts: ROUGE-L of a continuation", "lower", "forget"),
    "forget_Q_A_ROUGE": _recall("Forgotten answers: ROUGE-L recall", "lower", "forget"),
    "forget_Q_A_PARA_Prob": _probability("Forgotten answers, reworded: probability", "lower", "forget"),
    "forget_Q_A_PARA_ROUGE": _recall("Forgotten questions, reworded: ROUGE-L recall", "lower", "forget"),
    "extraction_strength": _score(
        "Extraction strength", "lower", "forget", "Share of an answer that the model completes word for word."
    ),
    "exact_memorization": _score(
        "Exact memorization", "lower", "forget", "Share of the answer's tokens that are the model's first choice."
    ),
    "forget_truth_ratio": _truth("Forget truth ratio", "higher", "forget", _FORGET_TRUTH, "forget"),
    "forget_Truth_Ratio": Metric(
        "Forget truth ratio", "higher", "forget", _FORGET_TRUTH, aggregate=aggregate_truth_ratio
    ),
    "forget_level1_ROUGE": _recall("Forgotten subject, cloze: ROUGE-L recall", "lower", "forget"),
    "forget_level2_ROUGE": _recall("Forgotten subject, questions: ROUGE-L recall", "lower", "forget"),
    "forget_level3_ROUGE": _recall("Forgotten subject, attacked: ROUGE-L recall", "lower", "forget"),
    "forget_loss": Metric("Forget rows: loss", "higher", "forget", "Nats per token.", scale=None),
    "forget_quality": Metric(
        "Forget quality", "higher", "traces",
        "A p-value: above 0.05, the truth ratios cannot be told from those of a model that never saw the rows.",
        aggregate=aggregate_forget_quality, follows_from=has_forget_truth_ratio,
        retain_only_rows=lambda log: logged_truth_ratios(log, "forget"),
    ),
    "privleak": Metric(
        "Privacy leakage", "near", "traces", "Below 0 the rows look known, above 0 they are avoided too visibly.",
        target=0.0, scale=(-100.0, 100.0),
        aggregate=aggregate_privacy, follows_from=lambda names: PRIVACY_ATTACK in names,
        retain_only_rows=lambda log: aggregate_membership(log, None, PRIVACY_ATTACK),
    ),
    "mia_loss": _membership("Membership by loss"),
    "mia_zlib": _membership("Membership by loss over compressed size"),
    "mia_min_k": _membership("Membership by min-k"),
    "mia_min_k_plus_plus": _membership("Membership by min-k++"),
    "mia_reference": _membership("Membership against a retain-only model's loss"),
    "mia_gradnorm": _membership("Membership by gradient norm"),
    "model_utility": Metric(
        "Model utility", "higher", "retain", "One number for all that must stay: a harmonic mean of nine measures.",
        aggregate=aggregate_model_utility, follows_from=lambda names: not names.isdisjoint(UTILITY_PARTS),
    ),
    "retain_Q_A_Prob": _probability("Retained answers: probability", "higher", "retain"),
    "retain_knowmem_ROUGE": _f1("Retained knowledge: ROUGE-L", "higher", "retain"),
    "retain_Q_A_ROUGE": _recall("Retained answers: ROUGE-L recall", "higher", "retain"),
    "retain_Q_A_PARA_Prob": _probability("Retained answers, reworded: probability", "higher", "retain"),
    "retain_Truth_Ratio": _truth("Retain truth ratio", "higher", "retain", _TRUTH, "retain"),
    "retain_extraction_strength": _score(
        "Retained texts: extraction strength", "higher", "retain", "The same of rows that must stay."
    ),
    "neighbor_level1_ROUGE": _recall("Neighbouring subjects, cloze: ROUGE-L recall", "higher", "retain"),
    "neighbor_level2_ROUGE": _recall("Neighbouring subjects, questions: ROUGE-L recall", "higher", "retain"),
    "ra_Q_A_Prob_normalised": _options("Real authors: probability among options", "ra"),
    "ra_Q_A_ROUGE": _recall("Real authors: ROUGE-L recall", "higher", "retain"),
    "ra_Truth_Ratio": _truth("Real authors: truth ratio", "higher", "retain", _TRUTH, "ra"),
    "wf_Q_A_Prob_normalised": _options("World facts: probability among options", "wf"),
    "wf_Q_A_ROUGE": _recall("World facts: ROUGE-L recall", "higher", "retain"),
    "wf_Truth_Ratio": _truth("World facts: truth ratio", "higher", "retain", _TRUTH, "wf"),
    "ra_Q_A_Prob": _probability("Real authors: probability", "higher", "retain"),
    "wf_Q_A_Prob": _probability("World facts: probability", "higher", "retain"),
    "forget_Q_A_gibberish": _score(
        "Answers to forgotten questions: fluency", "higher", "retain", "Whether a classifier takes them for language."
    ),
    "retain_loss": Metric("Retain rows: loss", "lower", "retain", "Nats per token.", scale=None),
    "general_loss": Metric("General rows: loss", "lower", "retain", "Nats per token.", scale=None),
    "choices_acc": _score(
        "Multiple choice: accuracy", None, "other", f"Higher is better, unless it must be forgotten. {_CHOICE}"
    ),
    "forget_Q_A_PERT_Prob": _probability("Forgotten questions, wrong answers: probability", None, "other", _FALSE),
    "retain_Q_A_PERT_Prob": _probability("Retained questions, wrong answers: probability", None, "other", _FALSE),
    "ra_Q_A_PERT_Prob": _probability("Real authors, wrong answers: probability", None, "other", _FALSE),
    "wf_Q_A_PERT_Prob": _probability("World facts, wrong answers: probability", None, "other", _FALSE),
}  # fmt: skip


def _unnamed(**how) -> Metric:
    return Metric("", None, "other", scale=None, **how)


# Metrics that the table above does not name, by the form of their names; the first that matches counts. Their label is
# their name.
METRIC_FAMILIES: tuple[tuple[re.Pattern, Metric], ...] = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        ("forget_level3_.*_ROUGE", _recall("", "lower", "forget")),  # RWKU's ways of asking
        ("choices_acc_wmdp.*", _score("", "lower", "forget", _CHOICE)),
        ("choices_acc_mmlu.*", _score("", "higher", "retain", _CHOICE)),
        # lm-eval's 'task/metric', whose rows are not ours to aggregate
        ("wmdp.*/acc", Metric("", "lower", "forget", _CHOICE)),
        ("(mmlu.*|hellaswag|arc_.*|winogrande|piqa|boolq|openbookqa|gsm8k|truthfulqa_mc.*|triviaqa|lambada.*)/"
         "(acc.*|exact_match.*)", Metric("", "higher", "retain", "A general benchmark.")),
        ("mia_.+", _unnamed(aggregate=aggregate_membership, parts=MEMBERSHIP_PARTS)),
        ("(?i:(forget|retain|ra|wf)_truth_ratio)", _unnamed(aggregate=aggregate_truth_ratio)),
        (".+_Prob(_normalised)?", _unnamed(aggregate=mean_of("prob"))),
        (".+_(knowmem|verbmem)_ROUGE", _unnamed(aggregate=mean_of("rougeL_f1"))),  # MUSE
        (".+_ROUGE", _unnamed(aggregate=mean_of("rougeL_recall"))),
        ("(.+_)?(extraction_strength|exact_memorization|gibberish)", _unnamed(aggregate=mean_of("score"))),
        ("(.+_)?acc(uracy)?(_.+)?", _unnamed(aggregate=mean_of("score"))),  # multiple choice
    )
)  # fmt: skip


def metric_of(name: str) -> Metric:
    """The metric's row of ``METRICS``, else its family's with the name as the label, else a row without a direction."""
    if name in METRICS:
        return METRICS[name]
    family = next((family for pattern, family in METRIC_FAMILIES if pattern.fullmatch(name)), _unnamed())
    return replace(family, label=name)


def computable_metrics(names: set[str]) -> set[str]:
    """The metrics of a log, and those of the table that follow from them."""
    computable = set(names)
    while more := {
        name
        for name, metric in METRICS.items()
        if name not in computable and metric.follows_from is not None and metric.follows_from(computable)
    }:
        computable |= more
    return computable
