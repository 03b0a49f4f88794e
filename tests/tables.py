"""A row for every row of the package's tables, and golden values with their sources."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class LossSample:
    """What a loss may read of one sample, as plain numbers.

    Attributes:
        log_p, log_p_reference: log probability of the completion under the model and under the reference model.
        refusal, refusal_reference: the same of a refusal.
        distributions: per completion token, the next-token probabilities of the model, the reference model and the
            origin.
        tokens: the completion tokens.
        states: per completion token, the hidden state of the model and of the reference model.
        beta, margin: the loss's parameters.
    """

    log_p: float
    log_p_reference: float
    refusal: float
    refusal_reference: float
    distributions: list[tuple[list[float], list[float], list[float]]]
    tokens: list[int]
    states: list[tuple[list[float], list[float]]]
    beta: float
    margin: float

    @property
    def ratio(self) -> float:
        return math.exp(self.log_p - self.log_p_reference)

    @property
    def length(self) -> int:
        return len(self.distributions)


@dataclass(frozen=True)
class LossRow:
    """The loss of a sample as an obvious loop, and its value on ``PENCIL_SAMPLE``."""

    loop: Callable[[LossSample], float]
    golden: float
    source: str


def _simnpo(sample: LossSample) -> float:
    sigmoid = 1 / (1 + math.exp(-(-sample.beta / sample.length * sample.log_p - sample.beta * sample.margin)))
    return -2 / sample.beta * math.log(sigmoid)


def _dpo(sample: LossSample) -> float:
    gain = math.exp(sample.refusal - sample.refusal_reference) / sample.ratio
    return -2 / sample.beta * math.log(1 / (1 + gain**-sample.beta))


def _kl(sample: LossSample, teacher: int = 1) -> float:
    total = 0.0
    for distributions in sample.distributions:
        total += sum(p * math.log(p / q) for p, q in zip(distributions[teacher], distributions[0], strict=True))
    return total / sample.length


def _weighted_ascent(sample: LossSample, importance: int) -> float:
    total = 0.0
    for (own, _, _), token in zip(sample.distributions, sample.tokens, strict=True):
        p = own[token]
        total += p**sample.beta * (1 - p) ** importance * math.log(p)
    return total / sample.length


def _ihl(sample: LossSample) -> float:
    total = 0.0
    for (own, _, _), token in zip(sample.distributions, sample.tokens, strict=True):
        total += max(0, 1 + own[token] - max(p for v, p in enumerate(own) if v != token))
    return total / sample.length


def _undial(sample: LossSample) -> float:
    total = 0.0
    for (own, reference, _), token in zip(sample.distributions, sample.tokens, strict=True):
        lowered = [p * math.exp(-sample.beta if v == token else 0) for v, p in enumerate(reference)]
        total -= sum(q / sum(lowered) * math.log(p) for q, p in zip(lowered, own, strict=True))
    return total / sample.length


def _ce_u(sample: LossSample) -> float:
    values = []
    for (own, _, _), token in zip(sample.distributions, sample.tokens, strict=True):
        others = [p for v, p in enumerate(own) if v != token]
        values.append(-sum(p / sum(others) * math.log(p) for p in others))
    counted = values[1:] or values
    return sum(counted) / len(counted)


def _rmu(sample: LossSample) -> float:
    total = 0.0
    for own, reference in sample.states:
        u = torch.rand(len(own), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
        length = sample.beta * math.sqrt(sum(x**2 for x in reference)) / math.sqrt(sum(x**2 for x in u))
        total += sum((a - length * b) ** 2 for a, b in zip(own, u, strict=True)) / len(own)
    return total / len(sample.states)


def _embed_diff(sample: LossSample) -> float:
    total = 0.0
    for own, reference in sample.states:
        total += sum((a - b) ** 2 for a, b in zip(own, reference, strict=True)) / len(own)
    return total / len(sample.states)


# One completion token, a vocabulary of two, states of width one (where RMU's unit vector is 1).
PENCIL_SAMPLE = LossSample(
    log_p=math.log(3 / 4),
    log_p_reference=math.log(1 / 2),
    refusal=math.log(1 / 3),
    refusal_reference=math.log(1 / 2),
    distributions=[([3 / 4, 1 / 4], [1 / 2, 1 / 2], [1 / 4, 3 / 4])],
    tokens=[0],
    states=[([3.0], [-2.0])],
    beta=1.0,
    margin=math.log(4),
)
LOSSES: dict[str, LossRow] = {
    "gradient-ascent": LossRow(lambda s: s.log_p / s.length, math.log(3 / 4), "by hand: log 3/4"),
    "npo": LossRow(
        lambda s: 2 / s.beta * math.log(1 + s.ratio**s.beta), 2 * math.log(5 / 2), "by hand: 2 log(1 + (3/4)/(1/2))"
    ),
    "simnpo": LossRow(_simnpo, 2 * math.log(4), "by hand: 2 log(1 + e^-(log 4/3 - log 4)) = 2 log(1 + 3)"),
    "dpo": LossRow(_dpo, 2 * math.log(13 / 4), "by hand: ratios 2/3 and 3/2, 2 log(1 + (3/2)/(2/3))"),
    "rmu": LossRow(_rmu, 1.0, "by hand: (3 - 1 * 2 * 1)^2"),
    "wga": LossRow(lambda s: _weighted_ascent(s, 0), 3 / 4 * math.log(3 / 4), "by hand: 3/4 log 3/4"),
    "satimp": LossRow(lambda s: _weighted_ascent(s, 1), 3 / 16 * math.log(3 / 4), "by hand: 3/4 1/4 log 3/4"),
    "ihl": LossRow(_ihl, 3 / 2, "by hand: 1 + 3/4 - 1/4"),
    "undial": LossRow(
        _undial, (math.log(4 / 3) + math.e * math.log(4)) / (1 + math.e), "by hand: the teacher is (1, e) / (1 + e)"
    ),
    "ce-u": LossRow(_ce_u, math.log(4), "by hand: the only other token has 1/4"),
    "origin-kl": LossRow(lambda s: _kl(s, 2), math.log(3) / 2, "by hand: 1/4 log 1/3 + 3/4 log 3"),
    "nll": LossRow(lambda s: -s.log_p / s.length, math.log(4 / 3), "by hand: -log 3/4"),
    "kl": LossRow(_kl, math.log(4 / 3) / 2, "by hand: 1/2 log((1/2)/(3/4)) + 1/2 log((1/2)/(1/4))"),
    "embed-diff": LossRow(_embed_diff, 25.0, "by hand: (3 + 2)^2"),
}

# Tensor a conflicts: <f, r> = -4 + 1 = -3, ||r||^2 = 5; tensor b does not: <f, r> = 6.
FORGET_GRADIENTS = {"a": torch.tensor([2.0, 1.0, 0.0]), "b": torch.tensor([3.0])}
RETAIN_GRADIENTS = {"a": torch.tensor([-2.0, 1.0, 0.0]), "b": torch.tensor([2.0])}


@dataclass(frozen=True)
class CombinerRow:
    """The combined gradient of ``FORGET_GRADIENTS`` and ``RETAIN_GRADIENTS`` with gamma = 2 and alpha = 3.

    Attributes:
        guards: <g, g_r> >= 0 whatever the weights.
        adds: it is the sum where no signs conflict.
        scales: it scales with a common scale of both gradients.
    """

    combined: dict[str, list[float]]
    source: str
    guards: bool = True
    adds: bool = True
    scales: bool = True


COMBINERS: dict[str, CombinerRow] = {
    "sum": CombinerRow({"a": [-2, 5, 0], "b": [12]}, "by hand: 2 f + 3 r", guards=False),
    "pcgrad": CombinerRow(
        {"a": [8 / 5 - 6, 16 / 5 + 3, 0], "b": [12]},
        "by hand: a alone is projected, f - (-3/5) r = (2 - 6/5, 1 + 3/5, 0) = (4/5, 8/5, 0)",
    ),
    "pcgrad-global": CombinerRow({"a": [-2, 5, 0], "b": [12]}, "by hand: <f, r> = -3 + 6 = 3 over all, no conflict"),
    "sago": CombinerRow({"a": [-6, 2, 0], "b": [6]}, "by hand: the first element alone conflicts", adds=False),
    "sago-prefer-retain": CombinerRow(
        {"a": [-6, 5, 0], "b": [12]}, "by hand: the first element alone conflicts; the sum elsewhere"
    ),
    "normalised": CombinerRow(
        {"a": [4 / 14**0.5 - 2, 2 / 14**0.5 + 1, 0], "b": [6 / 14**0.5 + 2]},
        "by hand: ||f|| = sqrt(14), ||r|| = 3; 2 f / sqrt(14) + 3 r / 3",
        guards=False,
        adds=False,
        scales=False,
    ),
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
    "full-rank": [
        "0 steps on all rows, read on the same",
        "1 step on all rows, read on the same",
        "2 steps on all rows, read on the same",
    ],
    "requantization": ["as it is", "NF4", "int8", "GGUF Q8_0", "GGUF Q4_1", "NF4 below the adapters"],
    "paraphrase": ["as asked", "in other words"],
    "rewording": ["as a request", "in a French frame", "in a German frame", "in a Spanish frame"],
    "aliases": ["surname alone", "initials"],
    "hops": ["from the answer to the name"],
    "conversation": ["role play", "asked for training data", "first words of an answer given"],
    "prefix": ["0% of the answer given", "50% of the answer given"],
    "sampling": ["greedy", "leak@1 of 2 samples at temperature 1", "leak@2 of 2 samples at temperature 1"],
    "logit-lens": ["after the last block", "after the likeliest block"],
    "depth": ["all blocks", "lower half", "upper half"],
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


# Format -> the files that it writes beside the record and the page of commands.
EXPORTS: dict[str, set[str]] = {
    "gguf": {"adapter.gguf"},
    "gguf-merged": {"model.gguf"},
    "ollama": {"adapter.gguf", "Modelfile"},
    "mlx": {"adapters.safetensors", "adapter_config.json"},
    "vllm": {"adapter_model.safetensors", "adapter_config.json", "perta_provenance.json", "README.md"},
    "peft": {"adapter_model.safetensors", "adapter_config.json", "perta_provenance.json", "README.md"},
}
