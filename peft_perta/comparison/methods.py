"""The table of the methods that are compared.

To add a method: write a function from a ``Setup`` to a ``MethodAdapter`` in a file beside this one, and add its row to
``METHODS``. The row holds all that the comparison, the picture and ``compare --list`` know about it.
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
_NPO = {"forget_loss": "npo", "beta": 0.03}  # at 0.1 it stalls before the retain-only model's forget loss
_RMU = {"forget_loss": "rmu", "retain_loss": "embed-diff", "retain_weight": 30.0}

METHODS: dict[str, Method] = {
    "negation": Method(
        "plain negation of the forget adapter (task arithmetic)", perta(weighting="uniform"), "negation"
    ),
    "uniform": Method(
        "control: every weight 1/2, which is plain negation at half the strength",
        perta(weighting="uniform", strength=0.5),
        "control",
    ),
    "perta-grad": Method(
        "the default: weights |g_f| / (|g_f| + |g_r|) on A and B, and on input directions", perta(), "perta"
    ),
    "perta-fisher": Method("perta-grad with squared mean gradients", perta(weighting="fisher"), "perta"),
    "perta-empirical-fisher": Method(
        "perta-grad with mean squared per-sample gradients", perta(weighting="empirical-fisher"), "perta"
    ),
    "perta-power-0.5": Method("perta-grad with power 0.5: weights closer to 1/2", perta(power=0.5), "perta"),
    "perta-power-4": Method("perta-grad with power 4: weights closer to 0 or 1", perta(power=4.0), "perta"),
    "perta-grad-undirected": Method(
        "perta-grad without weights on input directions", perta(input_directions=False), "perta"
    ),
    "perta-fisher-undirected": Method(
        "perta-fisher without weights on input directions", perta(weighting="fisher", input_directions=False), "perta"
    ),
    "perta-grad-separable": Method(
        "perta-grad with one weight per row times one per column of the delta", perta(granularity="separable"), "perta"
    ),
    "perta-fisher-separable": Method(
        "perta-fisher with one weight per row times one per column of the delta",
        perta(granularity="separable", weighting="fisher"),
        "perta",
    ),
    "perta-grad-delta": Method(
        "perta-grad on the delta, fitted to the forget adapter's rank", perta(granularity="delta"), "perta"
    ),
    "perta-fisher-delta": Method(
        "perta-fisher on the delta, fitted to the forget adapter's rank",
        perta(granularity="delta", weighting="fisher"),
        "perta",
    ),
    "perta-grad-factor+delta": Method(
        "perta-grad on A and B, then on their product, fitted to the forget adapter's rank",
        perta(granularity="factor+delta"),
        "perta",
    ),
    "perta-grad-factor+delta-256": Method(
        "perta-grad-factor+delta at rank 256: exact for layers up to 256 wide",
        perta(granularity="factor+delta", **_WIDE),
        "perta",
    ),
    "paper-grad": Method(
        "PerTA-grad as published, weights on the delta alone, at rank 256: exact for layers up to 256 wide",
        perta(**_PAPER, **_WIDE),
        "perta",
    ),
    "paper-fisher": Method(
        "PerTA-fisher as published, at rank 256", perta(**_PAPER, **_WIDE, weighting="fisher"), "perta"
    ),
    "paper-grad-fitted": Method("paper-grad, fitted to the forget adapter's rank", perta(**_PAPER), "perta"),
    "paper-fisher-fitted": Method(
        "paper-fisher, fitted to the forget adapter's rank", perta(**_PAPER, weighting="fisher"), "perta"
    ),
    "shuffled": Method(
        "control: perta-grad with its weights shuffled within each matrix", perta(weighting="grad-shuffled"), "control"
    ),
    "mean": Method("control: perta-grad with each matrix's mean weight", perta(weighting="grad-mean"), "control"),
    "shuffled-undirected": Method(
        "control: perta-grad-undirected with its weights shuffled within each matrix",
        perta(weighting="grad-shuffled", input_directions=False),
        "control",
    ),
    "mean-undirected": Method(
        "control: perta-grad-undirected with each matrix's mean weight, so that only a strength per layer remains",
        perta(weighting="grad-mean", input_directions=False),
        "control",
    ),
    "uipe": Method(
        f"perta-grad extrapolated by 1 + alpha = {1 + ALPHA:g} (UIPE); the same adapter at matched forgetting",
        extrapolated(perta(), ALPHA),
        "extrapolation",
    ),
    "llmeraser": Method(
        "forget rows erased from the task adapter by its Gauss-Newton curvature (LLMEraser)",
        llmeraser,
        "influence",
        needs_forget_adapter=False,
    ),
    "random": Method(
        "control: random deltas with the ranks and norms of perta-grad's", random_like(perta()), "control"
    ),
    "gradient-ascent": Method(
        "trained: gradient ascent plus the retain loss (GradDiff)",
        trained(forget_loss="gradient-ascent", combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "npo": Method(
        "trained: negative preference optimisation (NPO) plus the retain loss",
        trained(**_NPO, combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "simnpo": Method(
        "trained: NPO per token and without a reference model (SimNPO) plus the retain loss",
        trained(forget_loss="simnpo", combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "rmu": Method(
        "trained: hidden states of forget rows steered to a random direction, those of retain rows kept (RMU)",
        trained(**_RMU, combiner="sum"),
        "trained",
        needs_forget_adapter=False,
    ),
    "pcgrad": Method(
        "trained: NPO, its two gradients combined per tensor by PCGrad",
        trained(**_NPO, combiner="pcgrad"),
        "trained",
        needs_forget_adapter=False,
    ),
    "sago": Method(
        "trained: NPO, its two gradients combined per element by SAGO",
        trained(**_NPO, combiner="sago", learning_rate=2e-3),
        "trained",
        needs_forget_adapter=False,
    ),
    "perta+sago": Method(
        "trained: sago, started from perta-grad's adapter",
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


def format_methods() -> str:
    """One line for each method: its name, what it needs, and its description."""
    width = max(map(len, METHODS))
    lines = [f"{'method':<{width}}  {'needs':<14}  description"]
    for name, method in METHODS.items():
        needed = "forget adapter" if method.needs_forget_adapter else "-"
        lines.append(f"{name:<{width}}  {needed:<14}  {method.description}")
    return "\n".join(lines)


def check_methods(names: Sequence[str]) -> None:
    """Check that every name is a method.

    Raises:
        ConfigError: a name is not in ``METHODS``.
    """
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"methods: expected some of {list(METHODS)}, found {name!r}")
