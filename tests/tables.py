"""A row for every row of the package's tables, and golden values with their sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import builders
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerRow:
    """One layer kind.

    Attributes:
        build: a tiny model whose adapted layers are all of this kind.
        build_double: the same in float64, if the kind can be float64.
        layer_class: the class of the base layers, if each has one weight.
        float_weight: the weight [O, I] of such a layer in floating point, without the package's own code.
        one_at_a_time: gradients come as one tensor per batch, so that squares need samples one at a time.
    """

    build: Callable[[], PeftModel]
    build_double: Callable[[], PeftModel] | None = None
    layer_class: type[nn.Module] | None = None
    float_weight: Callable[[nn.Module], Tensor] | None = None
    one_at_a_time: bool = False


def _nf4_weight(layer: bnb.nn.Linear4bit) -> Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def _int8_weight(layer: bnb.nn.Linear8bitLt) -> Tensor:
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.float() * (scales.float().unsqueeze(1) * (1 / 127))


LAYER_ROWS: dict[str, LayerRow] = {
    "linear": LayerRow(
        builders.adapted_llama,
        lambda: builders.adapted_llama(torch.float64),
        nn.Linear,
        lambda layer: layer.weight.detach().clone(),
    ),
    "linear4bit": LayerRow(builders.adapted_nf4_llama, None, bnb.nn.Linear4bit, _nf4_weight),
    "linear8bit": LayerRow(builders.adapted_int8_llama, None, bnb.nn.Linear8bitLt, _int8_weight),
    "conv1d": LayerRow(
        builders.adapted_gpt2,
        lambda: builders.adapted_gpt2(torch.float64),
        Conv1D,
        lambda layer: layer.weight.detach().T.clone(),
    ),
    "experts": LayerRow(builders.adapted_mixtral, one_at_a_time=True),
}
LAYERS = {name: row.build for name, row in LAYER_ROWS.items()}
DOUBLES = {name: row.build_double for name, row in LAYER_ROWS.items() if row.build_double}
ONE_AT_A_TIME = tuple(name for name, row in LAYER_ROWS.items() if row.one_at_a_time)


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
