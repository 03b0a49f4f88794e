"""A row for every row of the package's tables, and golden values with their sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import builders
import torch
from peft import PeftModel
from torch import Tensor

# Layer kind -> a tiny model whose adapted layers are all of this kind.
LAYERS: dict[str, Callable[[], PeftModel]] = {
    "linear": builders.adapted_llama,
    "linear4bit": builders.adapted_nf4_llama,
    "linear8bit": builders.adapted_int8_llama,
    "conv1d": builders.adapted_gpt2,
    "experts": builders.adapted_mixtral,
}
# The kinds with one gradient per batch, so that squares need batches of one sample.
ONE_AT_A_TIME = ("experts",)
# The kinds whose base can be float64 -> the same model in float64.
DOUBLES: dict[str, Callable[[], PeftModel]] = {
    "linear": lambda: builders.adapted_llama(torch.float64),
    "conv1d": lambda: builders.adapted_gpt2(torch.float64),
}


def batch_size(kind: str, statistic: str, wished: int = 2) -> int:
    return 1 if statistic == "squares" and kind in ONE_AT_A_TIME else wished


@dataclass(frozen=True)
class WeightingRow:
    """Magnitudes of both sets and the weights that they give, at the weighting's own power."""

    forget: list[float]
    retain: list[float]
    weights: list[float]
    source: str


_SHUFFLED = "torch.randperm of 3 with a generator seeded by 0 is (2, 0, 1), printed once; the rest as unshuffled"
WEIGHTINGS: dict[str, WeightingRow | None] = {
    "uniform": None,  # 1 everywhere: takes no gradients
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

# A layer to compute by hand: O = I = 2, R = 1, s = 2; its task vector is 2 * [1, 3]^T [1, 2] = [[2, 4], [6, 12]].
A = torch.tensor([[1.0, 2.0]])
B = torch.tensor([[1.0], [3.0]])
SCALING = 2.0
# Two tokens: x = (1, 0), (2, 1), g = (1, 1), (0, -1). G = g^T x = [[1, 0], [-1, -1]].
X = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
G = torch.tensor([[1.0, 1.0], [0.0, -1.0]])


@dataclass(frozen=True)
class GranularityRow:
    """For that layer: gradients, their arranged magnitudes, and the edit of given weights."""

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

# Fit -> the measure that it minimises, with D the error E - B A [O, I].
FITS: dict[str, str] = {
    "truncated": "||D||^2",
    "kronecker": "sum p_i q_j D_ij^2",
    "second-moment": "tr(D C D^T)",
    "weighted": "sum h_ij D_ij^2",
}

# The engine's modes; tests/test_engine.py runs each against a loop over samples.
MODES = ("grouped", "layerwise")
