"""What every pass over samples needs: a progress bar, and a check of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Batch
from ..errors import NumericalError
from ..model import distributed

Advance = Callable[[int], None]  # moves a progress bar on by a number of samples


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
    if not bool(finite.all()):
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
