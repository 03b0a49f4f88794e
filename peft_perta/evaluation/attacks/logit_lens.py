"""Logit lens: read the answer out of the states after each block, by the model's own norm and head.

An answer that is missing from the output may still stand in the middle of the network.

Reference: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...data import Sample, batches
from ...errors import NumericalError
from ...model import input_device, preserved
from ..subject import Subject
from .attack import Attack, AttackResult, AttackSettings, Measured, Victims, attacked_rows, check_victims, compare
from .measures import of_losses
from .states import blocks_of, losses_after_each

_NAME = "logit-lens"


def check(victims: Victims, settings: AttackSettings) -> None:
    """
    Raises:
        UnsupportedLayerError: a model has no decoder blocks.
    """
    check_victims(victims, settings)
    for _, subject in victims.subjects():
        blocks_of(subject, _NAME)


def run(victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """Loss and probability of the answers after the last block, and after the block where each is likeliest."""
    rows = attacked_rows(victims, settings)

    def measure(subject: Subject, name: str) -> dict[str, Measured]:
        losses = lens(subject, subject.encode(rows, name), name)
        best = losses.min(1).values
        return {
            "after the last block": Measured(of_losses(losses[:, -1].tolist())),
            "after the likeliest block": Measured(of_losses(best.tolist())),
        }

    return compare(_NAME, victims, measure)


ATTACK = Attack(_NAME, "Read the answer out of the states after every block.", check, run)


def lens(subject: Subject, samples: list[Sample], name: str) -> Tensor:
    """The loss of each completion as read after each block: [N, L], nats per token, float64 on the CPU.

    The states after block l take the place of the last block's output, so that the model itself applies what follows
    (its norm and its head).

    Args:
        subject: the model.
        samples: N samples.
        name: of the progress bar, and in messages.

    Raises:
        NumericalError: a loss is not finite.
    """
    blocks = blocks_of(subject, _NAME)
    rows = torch.empty(len(samples), len(blocks), dtype=torch.float64)
    bar = tqdm(total=len(samples), desc=name, unit="row", disable=not subject.show_progress_bar, leave=False)
    with bar, preserved(subject.model, subject.adapters), torch.no_grad():
        for batch in batches(samples, subject.batch_size):
            own = batch.to(input_device(subject.model))
            rows[batch.indices] = losses_after_each(subject.model, blocks, own).double().cpu()
            bar.update(len(batch.indices))
    if not rows.isfinite().all():
        raise NumericalError(f"{name}: a loss is not finite; evaluate in float32 or bfloat16")
    return rows
