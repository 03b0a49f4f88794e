"""What every pass over samples needs: this process's batches, their losses' gradient, and a progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Batch, Sample, batches
from ..errors import NumericalError
from ..model import distributed, input_device, sample_losses

Advance = Callable[[int], None]  # moves a progress bar on by a number of samples


def shared_batches(samples: list[Sample], micro_batch: int, model: nn.Module) -> list[Batch]:
    """This process's batches of a set. A filler, without indices, makes up the number on a sharded model: taps sum
    nothing of it."""
    own, fillers = distributed.share(list(batches(samples, micro_batch)), model)
    return [*own, *(dataclasses.replace(filler, indices=[]) for filler in fillers)]


def run_backward(model: nn.Module, batch: Batch, name: str) -> None:
    """Run a batch forward, and backward from the sum of its losses.

    Args:
        model: the model.
        batch: the batch.
        name: the data set, for the error message.

    Raises:
        NumericalError: a loss is not finite; the message names the sample. All processes of a sharded model raise it.
    """
    with distributed.failing_together(model) if distributed.is_sharded(model) else nullcontext():
        losses = sample_losses(model, batch.to(input_device(model)))
        check_losses(losses, batch, name)
    losses.sum().backward()


def check_losses(losses: Tensor, batch: Batch, name: str) -> None:
    """Check that the losses of a batch are finite.

    Args:
        losses: one loss per sample, [N].
        batch: the batch that they belong to.
        name: the data set, for the error message.

    Raises:
        NumericalError: a loss is not finite; the message names the sample.
    """
    finite = torch.isfinite(losses)
    if batch.indices and not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise NumericalError(
            f"{name}, sample {batch.indices[first] + 1}: the loss is {losses[first].item()}; expected a finite loss. "
            "Check this row, and the model's dtype (float16 overflows where bfloat16 does not)"
        )


@contextmanager
def progress(total: int, description: str, shown: bool) -> Iterator[Advance]:
    """A progress bar over samples; the main process shows it for all processes.

    Args:
        total: the number of samples, over all processes.
        description: the bar's label.
        shown: whether to show the bar.

    Returns:
        A context manager whose value is a function that moves the bar on by a number of this process's samples.
    """
    with tqdm(total=total, desc=description, disable=not (shown and distributed.is_main())) as bar:

        def advance(samples: int) -> None:
            bar.update(min(samples * distributed.count(), total - int(bar.n)))

        yield advance
