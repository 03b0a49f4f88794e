"""One row for every row of the package's tables, and golden values with where each came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import builders
import torch
from peft import PeftModel
from torch import Tensor

# Layer kind -> a tiny model whose adapted layers are all of that kind, and whether its base can be float64.
LAYERS: dict[str, Callable[[], PeftModel]] = {
    "linear": builders.adapted_llama,
    "linear4bit": builders.adapted_nf4_llama,
    "linear8bit": builders.adapted_int8_llama,
    "conv1d": builders.adapted_gpt2,
    "experts": builders.adapted_mixtral,
}
# The kinds whose gradients come as one tensor a batch, so that squares need samples one at a time.
ONE_AT_A_TIME = ("experts",)
DOUBLES: dict[str, Callable[[], PeftModel]] = {
    "linear": lambda: builders.adapted_llama(torch.float64),
    "conv1d": lambda: builders.adapted_gpt2(torch.float64),
}


def batch_size(kind: str, statistic: str, wished: int = 2) -> int:
    return 1 if statistic == "squares" and kind in ONE_AT_A_TIME else wished


@dataclass(frozen=True)
class WeightingRow:
    """Magnitudes in, weights out, at the weighting's own power."""

    forget: list[float]
    retain: list[float]
    weights: list[float]
    source: str


_SHUFFLED = "torch.randperm of 3 with a generator seeded by 0 is (2, 0, 1), printed once; the rest as unshuffled"
WEIGHTINGS: dict[str, WeightingRow | None] = {
    "uniform": None,  # 1 everywhere: no statistics go in
    "grad": WeightingRow([3, 1, 0], [1, 1, 5], [3 / 4, 1 / 2, 0], "by hand, f/(f+r): 3/(3+1), 1/2, 0/5"),
    "fisher": WeightingRow([3, 1, 0], [1, 1, 5], [9 / 10, 1 / 2, 0], "by hand: 9/(9+1), 1/2, 0/25"),
    "empirical-fisher": WeightingRow([2, 1, 0], [1, 3, 0], [4 / 5, 1 / 10, 0], "by hand: 4/5, 1/10, 0/0 is 0"),
    "grad-shuffled": WeightingRow([3, 1, 0], [1, 1, 5], [0, 3 / 4, 1 / 2], _SHUFFLED),
    "fisher-shuffled": WeightingRow([3, 1, 0], [1, 1, 5], [0, 9 / 10, 1 / 2], _SHUFFLED),
    "empirical-fisher-shuffled": WeightingRow([2, 1, 0], [1, 3, 0], [0, 4 / 5, 1 / 10], _SHUFFLED),
    "grad-mean": WeightingRow([3, 1, 0], [1, 1, 5], [5 / 12] * 3, "by hand: (3/4 + 1/2 + 0)/3"),
    "fisher-mean": WeightingRow([3, 1, 0], [1, 1, 5], [7 / 15] * 3, "by hand: (9/10 + 1/2 + 0)/3"),
    "empirical-fisher-mean": WeightingRow([2, 1, 0], [1, 3, 0], [3 / 10] * 3, "by hand: (4/5 + 1/10 + 0)/3"),
}

# A layer small enough for a pencil: O = I = 2, R = 1, s = 2; its task vector 2 * [1, 3]^T [1, 2] = [[2, 4], [6, 12]].
A = torch.tensor([[1.0, 2.0]])
B = torch.tensor([[1.0], [3.0]])
SCALING = 2.0
# Two tokens: x = (1, 0), (2, 1), g = (1, 1), (0, -1). G = g^T x = [[1, 0], [-1, -1]].
X = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
G = torch.tensor([[1.0, 1.0], [0.0, -1.0]])


@dataclass(frozen=True)
class GranularityRow:
    """On the pencil layer: gradients, their magnitudes as arranged, and the edit that given weights make."""

    gradient: dict[str, Tensor]
    arranged: dict[str, Tensor]
    weights: dict[str, Tensor]
    edit: Tensor
    source: str


_PULLED = {"A": torch.tensor([[-4.0, -6.0]]), "B": torch.tensor([[2.0], [-6.0]])}
GRANULARITIES: dict[str, GranularityRow] = {
    "delta": GranularityRow(
        {"weight": torch.tensor([[1.0, 0.0], [-1.0, -1.0]])},
        {"weight": torch.tensor([[1.0, 0.0], [1.0, 1.0]])},
        {"weight": torch.tensor([[0.5, 0.25], [0.0, 1.0]])},
        torch.tensor([[-1.0, -1.0], [0.0, -12.0]]),
        "by hand: the task vector times the weights, negated",
    ),
    "factor": GranularityRow(
        # dL/dA = s B^T G = 2 (1-3, 0-3); dL/dB = s G A^T = 2 (1, -1-2)
        _PULLED,
        {"A": torch.tensor([[4.0, 6.0]]), "B": torch.tensor([[2.0], [6.0]])},
        {"A": torch.tensor([[0.25, 1.0]]), "B": torch.tensor([[1.0], [0.0625]])},
        torch.tensor([[-1.0, -4.0], [-0.75, -3.0]]),
        "by hand: sqrt(W_B) sqrt(W_A) = [[.5, 1], [.125, .25]] times the task vector, negated",
    ),
    "separable": GranularityRow(
        _PULLED,
        {"rows": torch.tensor([2.0, 6.0]), "columns": torch.tensor([4.0, 6.0])},
        {"rows": torch.tensor([0.25, 1.0]), "columns": torch.tensor([1.0, 0.0625])},
        torch.tensor([[-1.0, -0.5], [-6.0, -3.0]]),
        "by hand: sqrt(u) sqrt(v)^T = [[.5, .125], [1, .25]] times the task vector, negated",
    ),
    "factor+delta": GranularityRow(
        {**_PULLED, "weight": torch.tensor([[1.0, 0.0], [-1.0, -1.0]])},
        {
            "A": torch.tensor([[4.0, 6.0]]),
            "B": torch.tensor([[2.0], [6.0]]),
            "weight": torch.tensor([[1.0, 0], [1, 1]]),
        },
        {
            "A": torch.tensor([[0.25, 1.0]]),
            "B": torch.tensor([[1.0], [0.0625]]),
            "weight": torch.tensor([[0.5, 0.25], [0.0, 1.0]]),
        },
        torch.tensor([[-0.5, -1.0], [0.0, -3.0]]),
        "by hand: the edit of 'factor', [[-1, -4], [-.75, -3]], times the weights of 'delta'",
    ),
}

# Fit -> the measure that it is the best in: the edit's error [O, I] and both sets' moments -> a squared error.
FITS: dict[str, str] = {
    "truncated": "||D||^2",
    "kronecker": "sum p_i q_j D_ij^2",
    "second-moment": "tr(D C D^T)",
    "weighted": "sum h_ij D_ij^2",
}

# Attack -> the settings that it reports on test_attacks.ROWS with test_attacks.QUICK.
ATTACKS: dict[str, list[str]] = {
    "relearning": [
        "0 steps on 1 row, read on the other 3",
        "1 step on 1 row, read on the other 3",
        "2 steps on 1 row, read on the other 3",
        "0 steps on all rows, read on the same",
        "1 step on all rows, read on the same",
        "2 steps on all rows, read on the same",
    ],
    "requantization": ["as it is", "NF4", "int8"],
    "paraphrase": ["as asked", "in other words"],
    "prefix": ["0% of the answer given", "50% of the answer given"],
    "sampling": ["greedy", "best of 2 at temperature 1"],
    "switched-off": ["on", "off"],
}


@dataclass(frozen=True)
class SuiteRow:
    """The log's file name, a row of the forget split, and the question that attacks put; None for a suite without."""

    file_name: str
    row: dict | None
    question: str | None


SUITES: dict[str, SuiteRow] = {
    "tofu": SuiteRow("TOFU_EVAL.json", {"question": "Who?", "answer": "Khan"}, "Who?"),
    "muse": SuiteRow("MUSE_EVAL.json", {"question": "Where?", "answer": "Lima"}, "Where?"),
    "choices": SuiteRow("CHOICES_EVAL.json", None, None),
    "rwku": SuiteRow("RWKU_EVAL.json", {"query": "By whom?", "answer": "King"}, "By whom?"),
}


@dataclass(frozen=True)
class MetricRow:
    """A log, the retain-only model's, and the metric's aggregate by hand; None where it has no rule."""

    log: dict
    aggregate: float | None
    retain_only: dict | None = None


def _entry(field: str, *values) -> dict:
    return {"value_by_index": {str(index): {field: value} for index, value in enumerate(values)}}


def _mean(metric: str, field: str) -> MetricRow:
    return MetricRow({metric: _entry(field, 0.25, 0.75)}, 0.5)


def _losses(true: str, split: str) -> dict:
    """Two rows whose truth ratios are exp(1 - 2) and exp(2 - 2)."""
    return {
        true: _entry("avg_loss", 1.0, 2.0),
        f"{split}_Q_A_PERT_Prob": _entry("avg_loss", [2.0, 2.0], [1.0, 3.0]),
    }


def _options(split: str) -> MetricRow:
    log = {
        f"{split}_Q_A_Prob": _entry("prob", 0.6, 0.2),
        f"{split}_Q_A_PERT_Prob": _entry("prob", [0.2, 0.2], [0.3, 0.3]),
    }
    return MetricRow(log, (0.6 / 1.0 + 0.2 / 0.8) / 2)


_MEMBERSHIP = {"forget": _entry("score", 1.0, 3.0), "holdout": _entry("score", 2.0, 4.0)}  # 3 of 4 pairs in order
_FORGET_LOSSES = _losses("forget_Q_A_PARA_Prob", "forget")
_FORGET_TRUTH, _RETAIN_TRUTH = (math.exp(-1) + 1) / 2, (1 - math.exp(-1)) / 2
_UTILITY = {
    **{f"{split}_Truth_Ratio": _entry("score", 0.5) for split in ("retain", "ra", "wf")},
    **{f"{split}_Q_A_ROUGE": _entry("rougeL_recall", 0.5) for split in ("retain", "ra", "wf")},
    **{name: _entry("prob", 0.5) for name in ("retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised")},
}
_PROBABILITIES = [
    *(f"{split}_Q_A_Prob" for split in ("forget", "retain", "ra", "wf")),
    *(f"{split}_Q_A_PERT_Prob" for split in ("forget", "retain", "ra", "wf")),
    *(f"{split}_Q_A_PARA_Prob" for split in ("forget", "retain")),
]
_RECALLS = [
    *(f"{split}_Q_A_ROUGE" for split in ("forget", "retain", "ra", "wf")),
    *(f"forget_level{level}_ROUGE" for level in (1, 2, 3)),
    *(f"neighbor_level{level}_ROUGE" for level in (1, 2)),
    "forget_Q_A_PARA_ROUGE",
]
_F1S = ["forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "forget_verbmem_ROUGE"]
_SCORES = [
    "extraction_strength", "exact_memorization", "retain_extraction_strength", "forget_Q_A_gibberish", "choices_acc"
]  # fmt: skip
_ATTACKS = ["loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm"]
METRICS: dict[str, MetricRow] = {
    **{metric: _mean(metric, "prob") for metric in _PROBABILITIES},
    **{metric: _mean(metric, "rougeL_recall") for metric in _RECALLS},
    **{metric: _mean(metric, "rougeL_f1") for metric in _F1S},
    **{metric: _mean(metric, "score") for metric in _SCORES},
    **{f"mia_{attack}": MetricRow({f"mia_{attack}": _MEMBERSHIP}, 3 / 4) for attack in _ATTACKS},
    **{f"{split}_loss": MetricRow({}, None) for split in ("forget", "retain", "general")},
    "forget_truth_ratio": MetricRow(_FORGET_LOSSES, _FORGET_TRUTH),
    "forget_Truth_Ratio": MetricRow({"forget_Truth_Ratio": _entry("score", 0.5, 2.0)}, 0.5),
    "retain_Truth_Ratio": MetricRow(_losses("retain_Q_A_PARA_Prob", "retain"), _RETAIN_TRUTH),
    "ra_Truth_Ratio": MetricRow(_losses("ra_Q_A_Prob", "ra"), _RETAIN_TRUTH),
    "wf_Truth_Ratio": MetricRow(_losses("wf_Q_A_Prob", "wf"), _RETAIN_TRUTH),
    "ra_Q_A_Prob_normalised": _options("ra"),
    "wf_Q_A_Prob_normalised": _options("wf"),
    "forget_quality": MetricRow(_FORGET_LOSSES, 1.0, _FORGET_LOSSES),
    "privleak": MetricRow({"mia_min_k": _MEMBERSHIP}, (0.5 - 0.75) / 0.5 * 100),
    "model_utility": MetricRow(_UTILITY, 0.5),
}
