"""The methods that are compared: one row each.

To add one: a function from a ``Setup`` to what it ``Made``, in a file beside this one, and a row here.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters import SERVABLE_RANKS
from ..errors import ConfigError
from ._edits import extrapolated, perta, random_like
from ._influence import llmeraser
from ._method import Method
from ._trained import trained

ALPHA = 0.5  # of UIPE


_PAPER = {"granularity": "delta", "input_directions": False}


_WIDE = {"rank": SERVABLE_RANKS[-1]}


_NPO = {"forget_loss": "npo", "beta": 0.03}  # at 0.1 it levels off before the retain-only model's forget loss


_RMU = {"forget_loss": "rmu", "retain_loss": "embed-diff", "retain_weight": 30.0}


METHODS: dict[str, Method] = {
    "negation": Method("plain task arithmetic: the forget adapter, negated", perta(weighting="uniform"), "negation"),
    "uniform": Method(
        "every weight one half (tau = 0): plain negation at half the strength, and at matched forgetting the same",
        perta(weighting="uniform", strength=0.5),
        "control",
    ),
    "perta-grad": Method("the default: weights |g_f| / (|g_f| + |g_r|) on A and B, and on inputs", perta(), "perta"),
    "perta-fisher": Method("the same with the squared mean gradients", perta(weighting="fisher"), "perta"),
    "perta-empirical-fisher": Method(
        "the same with the mean squared per-sample gradients", perta(weighting="empirical-fisher"), "perta"
    ),
    "perta-power-0.5": Method("perta-grad with tau = 0.5: weights nearer to one half", perta(power=0.5), "perta"),
    "perta-power-4": Method("perta-grad with tau = 4: weights nearer to 0 or 1", perta(power=4.0), "perta"),
    "perta-grad-undirected": Method(
        "perta-grad without weighing input directions", perta(input_directions=False), "perta"
    ),
    "perta-fisher-undirected": Method(
        "perta-fisher without weighing input directions", perta(weighting="fisher", input_directions=False), "perta"
    ),
    "perta-grad-separable": Method(
        "perta-grad, rows times columns of the merged delta", perta(granularity="separable"), "perta"
    ),
    "perta-fisher-separable": Method(
        "perta-fisher, rows times columns of the merged delta",
        perta(granularity="separable", weighting="fisher"),
        "perta",
    ),
    "perta-grad-delta": Method(
        "perta-grad on the merged delta, fitted to the forget adapter's rank", perta(granularity="delta"), "perta"
    ),
    "perta-fisher-delta": Method(
        "perta-fisher on the merged delta, fitted to the forget adapter's rank",
        perta(granularity="delta", weighting="fisher"),
        "perta",
    ),
    "perta-grad-factor+delta": Method(
        "perta-grad on A and B, then on their product, fitted to the forget adapter's rank",
        perta(granularity="factor+delta"),
        "perta",
    ),
    "perta-grad-factor+delta-256": Method(
        "the same at rank 256: exact where no layer is wider", perta(granularity="factor+delta", **_WIDE), "perta"
    ),
    "paper-grad": Method(
        "PerTA-grad as published: weights on the merged delta alone, at rank 256: exact where no layer is wider",
        perta(**_PAPER, **_WIDE),
        "perta",
    ),
    "paper-fisher": Method(
        "PerTA-fisher as published, at rank 256", perta(**_PAPER, **_WIDE, weighting="fisher"), "perta"
    ),
    "paper-grad-fitted": Method("paper-grad, cut to the forget adapter's rank", perta(**_PAPER), "perta"),
    "paper-fisher-fitted": Method(
        "paper-fisher, cut to the forget adapter's rank", perta(**_PAPER, weighting="fisher"), "perta"
    ),
    "shuffled": Method(
        "control of perta-grad: the same weights in wrong places", perta(weighting="grad-shuffled"), "control"
    ),
    "mean": Method("control of perta-grad: each matrix's mean weight", perta(weighting="grad-mean"), "control"),
    "shuffled-undirected": Method(
        "control of perta-grad-undirected: the same weights in wrong places",
        perta(weighting="grad-shuffled", input_directions=False),
        "control",
    ),
    "mean-undirected": Method(
        "control of perta-grad-undirected: each matrix's mean weight, which leaves a strength a layer",
        perta(weighting="grad-mean", input_directions=False),
        "control",
    ),
    "uipe": Method(
        f"perta-grad extrapolated by 1 + alpha = {1 + ALPHA:g} (UIPE): at matched forgetting the same adapter",
        extrapolated(perta(), ALPHA),
        "extrapolation",
    ),
    "llmeraser": Method(
        "the forget rows erased from the task adapter by its Gauss-Newton curvature (LLMEraser)",
        llmeraser,
        "influence",
        needs_forget_adapter=False,
    ),
    "random": Method(
        "control of any direction, UIPE's too: random deltas of perta-grad's ranks and norms",
        random_like(perta()),
        "control",
    ),
    "gradient-ascent": Method(
        "trained: gradient ascent plus the retain loss (GradDiff)",
        trained(forget_loss="gradient-ascent", combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "npo": Method(
        "trained: negative preference optimisation plus the retain loss",
        trained(**_NPO, combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "simnpo": Method(
        "trained: the same without a retain-only model, per token",
        trained(forget_loss="simnpo", combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "rmu": Method(
        "trained: hidden states steered to a random one, and kept on the retain set",
        trained(**_RMU, combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "pcgrad": Method(
        "trained: npo with the two gradients combined by PCGrad, tensor by tensor",
        trained(**_NPO, combiner="pcgrad"),
        "trained",
        needs_forget_adapter=False,
    ),
    "sago": Method(
        "trained: npo with the two gradients combined by SAGO, element by element",
        trained(**_NPO, combiner="sago", learning_rate=2e-3),
        "trained",
        needs_forget_adapter=False,
    ),
    "perta+sago": Method(
        "trained: sago from perta-grad's adapter on",
        trained(perta(), **_NPO, combiner="sago", learning_rate=2e-3),
        "trained",
    ),
}


QUICK = (
    "negation",
    "perta-grad",
    "perta-fisher",
    "perta-empirical-fisher",
    "perta-grad-undirected",
    "perta-grad-separable",
    "paper-grad",
    "paper-grad-fitted",
    "shuffled",
    "uipe",
    "random",
)


def method_names() -> list[str]:
    """Of every method, in the order of the table."""
    return list(METHODS)


def check_methods(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: one is no method.
    """
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"methods: expected some of {method_names()}, found {name!r}")
