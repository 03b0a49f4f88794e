"""What is descended, and how the two gradients become one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .combiners import COMBINERS
from .losses import FORGET_LOSSES, RETAIN_LOSSES
from .losses.loss import REFUSAL

REFUSALS = (
    "I don't know.",
    "I have no information about that.",
    "I'm not able to answer that.",
    "That is something I don't know anything about.",
    "I can't say; I have not learned about this.",
    "I'm afraid I don't have an answer to that question.",
)


@dataclass(frozen=True)
class UnlearningSettings:
    """What ``UnlearningTrainer`` descends, and how. Each field's help says what it is.

    Raises:
        ConfigError: a value is of the wrong type or out of range, or of no use to the loss that is chosen.
    """

    forget_loss: str = field(default="npo", metadata={"help": "What is descended on the forget set."})
    retain_loss: str = field(default="nll", metadata={"help": "What is descended on the retain set."})
    combiner: str = field(default="pcgrad", metadata={"help": "How the two gradients become one."})
    forget_weight: float = field(default=1.0, metadata={"help": "gamma: of the forget gradient."})
    retain_weight: float = field(default=1.0, metadata={"help": "alpha: of the retain gradient."})
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Inverse temperature of npo, simnpo and dpo; rmu: length that is steered to, in the reference's. "
            "Default: the loss's own."
        },
    )
    margin: float | None = field(
        default=None, metadata={"help": "simnpo: loss per token from which on a sample counts less, nats. Default: 0."}
    )
    layer: int | None = field(
        default=None,
        metadata={"help": "rmu, embed-diff: whose hidden states, counted in blocks from 1. Default: the middle one."},
    )
    refusals: tuple[str, ...] = field(
        default=REFUSALS, metadata={"help": "dpo: what is to be said instead, row after row in turn."}
    )

    def __post_init__(self) -> None:
        tables = {"forget_loss": FORGET_LOSSES, "retain_loss": RETAIN_LOSSES, "combiner": COMBINERS}
        for name, table in tables.items():
            value = getattr(self, name)
            _check(isinstance(value, str) and value in table, name, f"one of {list(table)}", value)
        for name in ("forget_weight", "retain_weight"):
            value = getattr(self, name)
            _check(_is_number(value) and value > 0, name, "a number > 0", value)
        loss = FORGET_LOSSES[self.forget_loss]
        for name in ("beta", "margin"):
            value = getattr(self, name)
            if value is not None:
                _check(_is_number(value) and (value > 0 or name == "margin"), name, "a number > 0", value)
                _check(getattr(loss, name) is not None, name, f"none: {self.forget_loss!r} has no {name}", value)
        if self.layer is not None:
            whole = isinstance(self.layer, int) and not isinstance(self.layer, bool)
            _check(whole and self.layer > 0, "layer", "an integer from 1", self.layer)
            _check(self.needs_states, "layer", "none: neither loss looks at hidden states", self.layer)
        object.__setattr__(self, "refusals", tuple(self.refusals) if isinstance(self.refusals, list) else self.refusals)
        texts = isinstance(self.refusals, tuple) and all(isinstance(t, str) and t.strip() for t in self.refusals)
        _check(texts and len(self.refusals) > 0, "refusals", "texts, at least one", self.refusals)
        _check(
            self.needs_refusals or self.refusals == REFUSALS,
            "refusals", f"none: {self.forget_loss!r} says nothing instead", self.refusals,
        )  # fmt: skip

    @property
    def loss_values(self) -> tuple[float, float]:
        """beta and margin of the forget loss; 0 where it has none."""
        loss = FORGET_LOSSES[self.forget_loss]
        beta, margin = (
            getattr(loss, name) if getattr(self, name) is None else getattr(self, name) for name in ("beta", "margin")
        )
        return beta or 0.0, margin or 0.0

    @property
    def needs_refusals(self) -> bool:
        return REFUSAL in FORGET_LOSSES[self.forget_loss].reads

    @property
    def needs_states(self) -> bool:
        return FORGET_LOSSES[self.forget_loss].needs_states or RETAIN_LOSSES[self.retain_loss].needs_states

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; refusals only where they are used."""
        values = {**dataclasses.asdict(self), "refusals": list(self.refusals)}
        return values if self.needs_refusals else {k: v for k, v in values.items() if k != "refusals"}


def _check(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
