"""Full-rank attack: relearning that trains every weight of every linear layer but the head, not a small adapter.

The weights are not touched: a change of each, zero at first, is trained beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import UnsupportedLayerError
from ...model import free_memory, input_device, show_size
from .attack import Attack, AttackResult, AttackSettings, Victims, compare
from .projections import projections
from .relearning import added, check_rows, on_forget_rows, relearn

_BYTES = 16  # of a weight's change in float32: itself, its gradient, and AdamW's two moments


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        ConfigError: as ``check_rows``.
        UnsupportedLayerError: a model has no linear layer to train, or there is too little memory for the changes.
    """
    check_rows(victims, settings)
    needed = max(_BYTES * _weights(subject.model) for _, subject in victims.subjects())
    device = input_device(victims.unlearned.model)
    free = free_memory(device)
    if needed > free:
        raise UnsupportedLayerError(
            f"the full-rank attack trains a change of every weight: expected {show_size(needed)} free on {device}, "
            f"found {show_size(free)}; leave the attack out"
        )


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """As relearning on the largest number of forget rows, at a tenth of its learning rate: AdamW moves each weight by
    about the learning rate, and a rank-16 adapter moves it by less."""
    lesson = on_forget_rows(victims, settings, max(settings.relearning_rows))
    rate = settings.learning_rate / 10
    return compare("full-rank", victims, partial(relearn, changes, lesson, settings, learning_rate=rate))


ATTACK = Attack("full-rank", "Relearn with every weight, not with a small adapter.", check, run)


@contextmanager
def changes(model: nn.Module, seed: int) -> Iterator[list[Tensor]]:
    """Within the block, add a change D [O, I], zero at first, to every linear layer but the head; yields them.

    Args:
        model: the model.
        seed: not needed, as nothing is drawn.

    Raises:
        UnsupportedLayerError: the model has no linear layer.
    """
    with added(
        model, lambda projection, dtype: (torch.zeros(projection.shape, dtype=dtype),), lambda x, D: x @ D.T
    ) as parameters:
        yield parameters


def _weights(model: nn.Module) -> int:
    return sum(outputs * inputs for outputs, inputs in (projection.shape for projection in projections(model)))
