"""The table of the methods that are compared.

To add a method: write a function from a ``Setup`` to a ``MethodAdapter`` in a file beside this one, and add its row to
``METHODS``. The row holds all that the comparison, the picture and ``compare --list`` know about it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from ..adapters import SERVABLE_RANKS
from ..errors import ConfigError
from ._edits import extrapolated, perta, random_like, refined
from ._influence import llmeraser
from ._trained import BATCH, STEPS, trained
from .method import WARMUP, Family, Method, once

ALPHA = 0.5  # of UIPE
REFINED = "+directions"  # ends the name of a trained method that is refined
_PAPER: dict[str, Any] = {"granularity": "delta", "input_directions": False}
_WIDE: dict[str, Any] = {"rank": SERVABLE_RANKS[-1]}
_NPO = {"forget_loss": "npo", "beta": 0.03}  # at 0.1 it stalls before the retain-only model's forget loss
_SAGO: dict[str, Any] = {**_NPO, "combiner": "sago", "learning_rate": 2e-3}
_RMU = {"forget_loss": "rmu", "retain_loss": "embed-diff", "retain_weight": 30.0}


def _unlearn(description: str, *, family: Family = "perta", **options: Any) -> Method:
    """PerTA with these fields of PerTAConfig, as `peft-perta unlearn` runs it."""
    return Method(description, perta(**options), family, step="unlearn", options=options)


def _train(description: str, *, learning_rate: float = 1e-3, rounds: int = 1, **options: Any) -> Method:
    """A trained method with these fields of UnlearningSettings, as `peft-perta train` runs it."""
    return Method(
        description,
        once(trained(learning_rate=learning_rate, rounds=rounds, **options)),
        "trained",
        needs_forget_adapter=False,
        step="train",
        options={**options, "learning_rate": learning_rate},
        rounds=rounds,
    )


def _refined(method: Method, name: str) -> Method:
    """The adapter of a trained method, as `peft-perta refine` leaves it."""
    description = f"trained: {name}, then weighed along input directions"
    return dataclasses.replace(method, description=description, make=refined(method.make), is_refined=True)


_TRAINED: dict[str, Method] = {
    "gradient-ascent": _train(
        "trained: gradient ascent plus the retain loss (GradDiff)", forget_loss="gradient-ascent", combiner="sum"
    ),
    "npo": _train("trained: negative preference optimisation (NPO) plus the retain loss", **_NPO, combiner="sum"),
    "simnpo": _train(
        "trained: NPO per token and without a reference model (SimNPO) plus the retain loss",
        forget_loss="simnpo",
        combiner="sum",
    ),
    "rmu": _train(
        "trained: hidden states of forget rows steered to a random direction, those of retain rows kept (RMU)",
        **_RMU,
        combiner="sum",
    ),
    "pcgrad": _train("trained: NPO, its two gradients combined per tensor by PCGrad", **_NPO, combiner="pcgrad"),
    "sago": _train("trained: NPO, its two gradients combined per element by SAGO", **_SAGO),
    "sago+attacker": _train(
        "trained: sago, against an attacker that relearns, for twice as long", **_SAGO, relearning_steps=8, rounds=2
    ),
    "sago-longer": _train(
        "control: sago for three times as long, which costs as much as sago+attacker", **_SAGO, rounds=3
    ),
}

METHODS: dict[str, Method] = {
    "negation": _unlearn(
        "plain negation of the forget adapter (task arithmetic)", family="negation", weighting="uniform"
    ),
    "uniform": _unlearn(
        "control: every weight 1/2, which is plain negation at half the strength",
        family="control",
        weighting="uniform",
        strength=0.5,
    ),
    "perta-grad": _unlearn("the default: weights |g_f| / (|g_f| + |g_r|) on A and B, and on input directions"),
    "perta-fisher": _unlearn("perta-grad with squared mean gradients", weighting="fisher"),
    "perta-empirical-fisher": _unlearn(
        "perta-grad with mean squared per-sample gradients", weighting="empirical-fisher"
    ),
    "perta-power-0.5": _unlearn("perta-grad with power 0.5: weights closer to 1/2", power=0.5),
    "perta-power-4": _unlearn("perta-grad with power 4: weights closer to 0 or 1", power=4.0),
    "perta-grad-undirected": _unlearn("perta-grad without weights on input directions", input_directions=False),
    "perta-fisher-undirected": _unlearn(
        "perta-fisher without weights on input directions", weighting="fisher", input_directions=False
    ),
    "perta-grad-separable": _unlearn(
        "perta-grad with one weight per row times one per column of the delta", granularity="separable"
    ),
    "perta-fisher-separable": _unlearn(
        "perta-fisher with one weight per row times one per column of the delta",
        granularity="separable",
        weighting="fisher",
    ),
    "perta-grad-delta": _unlearn("perta-grad on the delta, fitted to the forget adapter's rank", granularity="delta"),
    "perta-fisher-delta": _unlearn(
        "perta-fisher on the delta, fitted to the forget adapter's rank", granularity="delta", weighting="fisher"
    ),
    "perta-grad-factor+delta": _unlearn(
        "perta-grad on A and B, then on their product, fitted to the forget adapter's rank", granularity="factor+delta"
    ),
    "perta-grad-factor+delta-256": _unlearn(
        "perta-grad-factor+delta at rank 256: exact for layers up to 256 wide", granularity="factor+delta", **_WIDE
    ),
    "paper-grad": _unlearn(
        "PerTA-grad as published, weights on the delta alone, at rank 256: exact for layers up to 256 wide",
        **_PAPER,
        **_WIDE,
    ),
    "paper-fisher": _unlearn("PerTA-fisher as published, at rank 256", **_PAPER, **_WIDE, weighting="fisher"),
    "paper-grad-fitted": _unlearn("paper-grad, fitted to the forget adapter's rank", **_PAPER),
    "paper-fisher-fitted": _unlearn("paper-fisher, fitted to the forget adapter's rank", **_PAPER, weighting="fisher"),
    "directions": _unlearn("input directions alone: every weight of A and B is 1/2", power=0.0),
    "shuffled": _unlearn(
        "control: perta-grad with its weights shuffled within each matrix", family="control", weighting="grad-shuffled"
    ),
    "mean": _unlearn("control: perta-grad with each matrix's mean weight", family="control", weighting="grad-mean"),
    "shuffled-undirected": _unlearn(
        "control: perta-grad-undirected with its weights shuffled within each matrix",
        family="control",
        weighting="grad-shuffled",
        input_directions=False,
    ),
    "mean-undirected": _unlearn(
        "control: perta-grad-undirected with each matrix's mean weight, so that only a strength per layer remains",
        family="control",
        weighting="grad-mean",
        input_directions=False,
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
    **_TRAINED,
    **{f"{name}{REFINED}": _refined(method, name) for name, method in _TRAINED.items()},
    "perta+sago": Method(
        "trained: sago, started from perta-grad's adapter",
        trained(perta(), **_SAGO),
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


FIRST = ("negation", "perta-grad", "rmu", "rmu+directions", "sago", "sago+directions")  # on a user's own model


def method_cells() -> list[tuple[str, str, str]]:
    """Below a header, one line for each method: its name, what it needs, and its description."""
    needs = {True: "forget adapter", False: "-"}
    methods = [(name, needs[method.needs_forget_adapter], method.description) for name, method in METHODS.items()]
    return [("method", "needs", "description"), *methods]


def format_methods() -> str:
    """The table of ``method_cells`` as text."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:<{width}}  {needed:<14}  {described}" for name, needed, described in method_cells())


def check_methods(names: Sequence[str]) -> None:
    """Check that every name is a method.

    Raises:
        ConfigError: a name is not in ``METHODS``.
    """
    for name in names:
        if name not in METHODS:
            nearest = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {nearest[0]!r}? --list describes each" if nearest else ""
            known = "one of the methods" if nearest else f"some of {list(METHODS)}"
            raise ConfigError(f"methods: expected {known}, found {name!r}{hint}")


def training_schedule(method: Method, forget_rows: int) -> dict[str, float]:
    """The settings of `peft-perta train` that give this comparison's steps and batch on so many forget rows."""
    return {"epochs": method.rounds * STEPS * BATCH / forget_rows, "batch_size": BATCH, "warmup_steps": WARMUP}
