"""The settings of an influence edit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..data import check_setting, explained, is_count, is_int, is_number, setting
from ..errors import ConfigError

CURVATURES = ("gauss-newton", "hessian")

SOLVERS = ("conjugate-gradients", "stochastic")

FACTORS = ("AB", "B")


@explained
@dataclass(frozen=True)
class InfluenceSettings:
    """How the system (H + damping) D = b of an influence edit is built and solved.

    Grosse et al. 2023 (arXiv 2308.03296) use a damping of 0.1, but only to rank rows. An edit takes the step, and an
    adapter that fits its rows well has almost no curvature there: with little damping the step leaves the region where
    the quadratic model holds. LoRA's factors also have directions that change nothing (A -> M A, B -> B M^-1). The
    provenance holds the damping as a number, and where the solver stopped.

    Raises:
        ConfigError: a value is out of its range, or two values contradict each other.
    """

    curvature: str = setting(
        "gauss-newton",
        "The curvature H: Gauss-Newton is never negative and needs no double backward; the Hessian is exact and may be "
        "indefinite.",
        CURVATURES,
    )
    damping: float = setting(
        10.0,
        "Added to the curvature, in units of the mean eigenvalue of the Gauss-Newton matrix: a number > 0. More makes "
        "a shorter, safer step.",
    )
    absolute_damping: float | None = setting(None, "The damping as a number > 0, in place of damping.")
    solver: str = setting(
        "conjugate-gradients",
        "How the system is solved: the stochastic solver takes many small steps per pass, for large training sets.",
        SOLVERS,
    )
    tolerance: float = setting(1e-2, "Solved when |b - (H + damping) D| / |b| is at most this: a number > 0 and < 1.")
    max_iterations: int = setting(100, "The largest number of products with the whole curvature: an int > 0.")
    curvature_samples: int | None = setting(
        None, "Take the curvature on this many evenly spaced training rows: an int > 0. By default all rows."
    )
    factors: str = setting(
        "AB", "The factors to edit: both, or only B, for an adapter that was trained with A frozen.", FACTORS
    )
    batch_size: int = setting(
        8, "Rows per batch: an int > 0. It changes no result, except for the steps of the stochastic solver."
    )
    max_length: int | None = setting(
        None,
        "Tokens per sample, as in the adapter's training: an int > 0. By default 1024, or the model's number of "
        "positions if that is less.",
    )
    seed: int = setting(0, "Seed of the preconditioner and of the stochastic solver's order: an int >= 0, below 2**63.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices:
                check_setting(value in choices, field.name, f"one of {', '.join(choices)}", value)
        for name in ("damping", "tolerance", "absolute_damping"):
            value = getattr(self, name)
            check_setting(_is_left_out(name, value) or (is_number(value) and value > 0), name, "a number > 0", value)
        check_setting(self.tolerance < 1, "tolerance", "a number < 1", self.tolerance)
        for name in ("max_iterations", "batch_size", "max_length", "curvature_samples"):
            value = getattr(self, name)
            check_setting(_is_left_out(name, value) or is_count(value), name, "an int > 0", value)
        check_setting(is_int(self.seed) and 0 <= self.seed < 2**63, "seed", "an int >= 0, below 2**63", self.seed)
        if self.solver == "stochastic" and self.curvature == "hessian":
            raise ConfigError(
                "solver='stochastic' expects curvature='gauss-newton', found 'hessian': on an indefinite Hessian it "
                "would diverge without notice; use the Gauss-Newton curvature, or solver='conjugate-gradients'"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON."""
        return dataclasses.asdict(self)


def _is_left_out(name: str, value: object) -> bool:
    return value is None and name in ("absolute_damping", "curvature_samples", "max_length")
