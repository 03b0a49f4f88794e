"""The knobs of an influence edit."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

CURVATURES = ("gauss-newton", "hessian")


SOLVERS = ("conjugate-gradients", "stochastic")


FACTORS = ("AB", "B")


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class InfluenceSettings:
    """How (H + damping) D = b is made and solved. Each field's help says what it is.

    ``damping`` is in units of the curvature's mean eigenvalue, as in Grosse et al. 2023 (arXiv 2308.03296), whose 0.1
    is for estimates that only rank rows. An edit is taken, and an adapter that fits its rows well has next to no
    curvature there: with little damping the step is far longer than the quadratic is true. LoRA's factors also have
    directions that change nothing (A -> M A, B -> B M^-1). What it came to is in the report.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """

    curvature: str = _knob(
        "gauss-newton", "gauss-newton (never negative, no double backward) or hessian (exact, may be indefinite)"
    )
    damping: float = _knob(
        10.0, "added to the curvature, times the Gauss-Newton's mean eigenvalue; more is a shorter, safer step"
    )
    absolute_damping: float | None = _knob(None, "the same as a number by itself, in place of damping")
    solver: str = _knob(
        "conjugate-gradients", "conjugate-gradients, or stochastic: many small steps a pass, for large training sets"
    )
    tolerance: float = _knob(1e-2, "solved when |b - (H + damping) D| / |b| is no more than this")
    max_iterations: int = _knob(100, "products with the whole curvature at most; the report says where it stopped")
    curvature_samples: int | None = _knob(
        None, "take the curvature of so many training rows, at even distances, in place of all"
    )
    factors: str = _knob("AB", "what is edited: both factors, or B alone (for an adapter whose A was frozen)")
    batch_size: int = _knob(8, "rows at a time; no result depends on it, but for the stochastic solver's steps")
    max_length: int = _knob(1024, "tokens per row, as the adapter was trained")
    seed: int = _knob(0, "of the preconditioner, and of the stochastic solver's order")

    def __post_init__(self) -> None:
        for name, choices in (("curvature", CURVATURES), ("solver", SOLVERS), ("factors", FACTORS)):
            value = getattr(self, name)
            _check(value in choices, name, f"one of {', '.join(choices)}", value)
        for name in ("damping", "tolerance"):
            _check(_is_number(getattr(self, name)), name, "a number > 0", getattr(self, name))
        _check(self.tolerance < 1, "tolerance", "a number < 1", self.tolerance)
        if self.absolute_damping is not None:
            _check(_is_number(self.absolute_damping), "absolute_damping", "a number > 0", self.absolute_damping)
        for name in ("max_iterations", "batch_size", "max_length"):
            _check(_is_count(getattr(self, name)), name, "an int > 0", getattr(self, name))
        if self.curvature_samples is not None:
            _check(_is_count(self.curvature_samples), "curvature_samples", "an int > 0", self.curvature_samples)
        _check(_is_count(self.seed + 1 if isinstance(self.seed, int) else 0), "seed", "an int >= 0", self.seed)
        if self.solver == "stochastic" and self.curvature == "hessian":
            raise ConfigError(
                "solver='stochastic' expects curvature='gauss-newton', found 'hessian': where a Hessian is indefinite, "
                "it would run away unseen; take the Gauss-Newton curvature, or conjugate gradients"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
