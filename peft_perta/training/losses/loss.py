"""The contract of a loss: readings in, one value a sample out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .loss_inputs import LossInputs

OWN, REFERENCE = "own", "reference"


REFUSAL, REFUSAL_REFERENCE = "refusal", "refusal reference"


@dataclass(frozen=True)
class Loss:
    """A row of a table.

    Attributes:
        function: (readings, beta, margin) -> [N], to be descended; the caller takes the mean over samples.
        reads: the readings that it needs: ``OWN``, the model in training, with a gradient; ``REFERENCE``, the same
            stack without the adapter in training; and both of the same prompts with a refusal for a completion.
        beta: its default, where the loss has one.
        margin: likewise.
        needs_states: whether the hidden states are looked at.
    """

    description: str
    function: Callable[[Mapping[str, LossInputs], float, float], Tensor]
    reads: tuple[str, ...] = (OWN,)
    beta: float | None = None
    margin: float | None = None
    needs_states: bool = False
