"""The contract of a loss: what it reads, and one value per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from .loss_inputs import LossInputs


class ForwardPass(Enum):
    """A forward pass that a loss may read.

    Every model is a switch of adapters on one base. The reference model is the stack without the adapter in training;
    the origin has every adapter off.
    """

    MODEL = "the model in training, on the samples; with a gradient"
    REFERENCE = "the reference model, on the samples"
    ORIGIN = "the origin, on the samples"
    MODEL_ON_REFUSALS = "the model in training, on the samples' prompts followed by refusals; with a gradient"
    REFERENCE_ON_REFUSALS = "the reference model, on the samples' prompts followed by refusals"

    @property
    def is_frozen(self) -> bool:
        """Whether it takes no gradient, since another model than the one in training runs it."""
        return self not in (ForwardPass.MODEL, ForwardPass.MODEL_ON_REFUSALS)

    @property
    def on_refusals(self) -> bool:
        """Whether its completions are refusals instead of the samples' own."""
        return self in (ForwardPass.MODEL_ON_REFUSALS, ForwardPass.REFERENCE_ON_REFUSALS)


@dataclass(frozen=True)
class Loss:
    """A row of ``FORGET_LOSSES`` or ``RETAIN_LOSSES``.

    Attributes:
        name: what the settings and the command line call it.
        description: one line for a user who chooses a loss. It says what ``beta`` means, where the loss has one.
        function: (inputs, beta, margin) -> [N], to be minimised. The trainer averages over samples. A loss without
            beta or margin ignores that argument.
        reads: the forward passes that it needs.
        beta: its default beta; None if it has none.
        margin: its default margin, in nats per token; None if it has none.
        needs_states: whether it reads hidden states.
    """

    name: str
    description: str
    function: Callable[[Mapping[ForwardPass, LossInputs], float, float], Tensor]
    reads: tuple[ForwardPass, ...] = (ForwardPass.MODEL,)
    beta: float | None = None
    margin: float | None = None
    needs_states: bool = False

    @property
    def reads_refusals(self) -> bool:
        """Whether it needs a refusal for every sample."""
        return any(forward_pass.on_refusals for forward_pass in self.reads)
