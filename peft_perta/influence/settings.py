"""The settings of an influence edit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..data import check_setting, is_count, is_int, is_number
from ..errors import ConfigError

CURVATURES = ("gauss-newton", "hessian")

SOLVERS = ("conjugate-gradients", "stochastic")

FACTORS = ("AB", "B")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class InfluenceSettings:
    """How the system (H + damping) D = b of an influence edit is built and solved.

    Attributes:
        curvature: 'gauss-newton' (never negative, needs no double backward) or 'hessian' (exact, may be indefinite).
        damping: is added to the curvature, in units of the mean eigenvalue of the Gauss-Newton matrix. More damping
            makes a shorter, safer step. Grosse et al. 2023 (arXiv 2308.03296) use 0.1, but only to rank rows. An edit
            takes the step, and an adapter that fits its rows well has almost no curvature there: with little damping
            the step leaves the region where the quadratic model holds. LoRA's factors also have directions that change
            nothing (A -> M A, B -> B M^-1). The provenance holds the damping as a number.
        absolute_damping: the damping as a number, in place of ``damping``.
        solver: 'conjugate-gradients', or 'stochastic' for large training sets: many small steps per pass.
        tolerance: the system is solved when |b - (H + damping) D| / |b| is at most this, below 1.
        max_iterations: the largest number of products with the whole curvature. The provenance says where the solver
            stopped.
        curvature_samples: take the curvature on this many evenly spaced training rows; None takes all rows.
        factors: 'AB' edits both factors, 'B' only B (for an adapter that was trained with A frozen).
        batch_size: rows per batch. It changes no result, except for the steps of the stochastic solver.
        max_length: tokens per row, as in the adapter's training.
        seed: of the preconditioner and of the stochastic solver's order.

    Raises:
        ConfigError: a value is out of its range, or two values contradict each other.
    """

    curvature: str = _setting(
        "gauss-newton", "gauss-newton (never negative, no double backward) or hessian (exact, may be indefinite)"
    )
    damping: float = _setting(
        10.0, "damping in units of the Gauss-Newton matrix's mean eigenvalue; more makes a shorter, safer step"
    )
    absolute_damping: float | None = _setting(None, "damping as a number, in place of damping")
    solver: str = _setting(
        "conjugate-gradients", "conjugate-gradients, or stochastic (many small steps per pass, for large training sets)"
    )
    tolerance: float = _setting(1e-2, "stop when |b - (H + damping) D| / |b| is at most this")
    max_iterations: int = _setting(100, "largest number of products with the whole curvature")
    curvature_samples: int | None = _setting(
        None, "take the curvature on this many evenly spaced training rows (default: all)"
    )
    factors: str = _setting("AB", "factors to edit: both, or only B (for an adapter trained with A frozen)")
    batch_size: int = _setting(8, "rows per batch; changes no result, except for the stochastic solver's steps")
    max_length: int = _setting(1024, "tokens per row, as in the adapter's training")
    seed: int = _setting(0, "seed of the preconditioner and of the stochastic solver's order")

    def __post_init__(self) -> None:
        for name, choices in (("curvature", CURVATURES), ("solver", SOLVERS), ("factors", FACTORS)):
            value = getattr(self, name)
            check_setting(value in choices, name, f"one of {', '.join(choices)}", value)
        for name in ("damping", "tolerance", "absolute_damping"):
            value = getattr(self, name)
            check_setting(_is_left_out(name, value) or (is_number(value) and value > 0), name, "a number > 0", value)
        check_setting(self.tolerance < 1, "tolerance", "a number < 1", self.tolerance)
        for name in ("max_iterations", "batch_size", "max_length", "curvature_samples"):
            value = getattr(self, name)
            check_setting(_is_left_out(name, value) or is_count(value), name, "an int > 0", value)
        check_setting(is_int(self.seed) and self.seed >= 0, "seed", "an int >= 0", self.seed)
        if self.solver == "stochastic" and self.curvature == "hessian":
            raise ConfigError(
                "solver='stochastic' expects curvature='gauss-newton', found 'hessian': on an indefinite Hessian it "
                "would diverge without notice; use the Gauss-Newton curvature, or solver='conjugate-gradients'"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON."""
        return dataclasses.asdict(self)


def _is_left_out(name: str, value: object) -> bool:
    return value is None and name in ("absolute_damping", "curvature_samples")
