"""What the modes share: the job that they are given, and what every one of them checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Batch
from ..errors import NumericalError
from ..model import Target, distributed
from .checkpoint import Checkpoint
from .gradient_sums import GradientSums, StatisticName
from .input_moments import Collector
from .plan import Plan

Advance = Callable[[int], None]  # by so many samples


SetSums = dict[str, dict[str, GradientSums]]  # set name -> layer name -> statistic


@dataclass
class Job:
    """Both sets' statistics of some targets, as the plan has it.

    Attributes:
        targets: by name.
        reader: what is kept of each, for instance a granularity.
        adapters: the adapters that are on while gradients are taken.
        done: names of the targets that need no statistics any more.
        checkpoint: where sums go that the next run may start from.
    """

    model: nn.Module
    targets: Mapping[str, Target]
    collector: Collector
    statistic: StatisticName
    adapters: list[str]
    plan: Plan
    done: set[str] = field(default_factory=set)
    checkpoint: Checkpoint | None = None
    show_progress_bar: bool = True

    def save_statistics(self, group: list[Target], set_name: str, found: Mapping[str, GradientSums]) -> None:
        """Keep one set's sums of a group, for a run that is cut off before the other set's are in."""
        if self.checkpoint is not None:
            record = {"layers": [t.name for t in group], "samples": next(iter(found.values())).samples}
            tensors = {f"{name}|{key}": total for name, s in found.items() for key, total in s.sums.items()}
            with distributed.failing_together():
                self.checkpoint.save(f"sums-{set_name}", tensors, record)

    def load_statistics(self, group: list[Target], set_name: str) -> dict[str, GradientSums] | None:
        """The sums that an earlier run kept of just this group, or None.

        Of several processes only the main one, which also writes and deletes the file, reads it.
        """
        if self.checkpoint is None:
            return None
        tensors, kept = {}, None
        with distributed.failing_together():
            entry = self.checkpoint.load(f"sums-{set_name}") if distributed.is_main() else None
            if entry is not None and entry[1]["layers"] == [target.name for target in group]:
                tensors = entry[0]
                kept = entry[1]["samples"], {key: (total.shape, total.dtype) for key, total in tensors.items()}
        kept = distributed.from_main(kept)
        if kept is None:
            return None
        samples, described = kept
        found = {target.name: GradientSums(self.statistic, samples=samples) for target in group}
        for key, (shape, dtype) in described.items():
            name, _, part = key.rpartition("|")
            total = tensors[key] if key in tensors else torch.zeros(shape, dtype=dtype)
            if self.plan.statistics == "device":
                total = total.to(self.targets[name].A.device)
            distributed.add_up(total)
            found[name].sums[part] = total
        return found


def check_losses(losses: Tensor, batch: Batch, name: str) -> None:
    """Raises NumericalError with the sample whose loss is not finite."""
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise NumericalError(
            f"{name}, sample {batch.indices[first] + 1}: the loss is {losses[first].item()}; expected a finite one. "
            "Look at the row, and at the model's dtype (float16 overflows where bfloat16 does not)"
        )


@contextmanager
def progress(total: int, what: str, shown: bool) -> Iterator[Advance]:
    """A bar over samples; the main process shows it for all."""
    with tqdm(total=total, desc=what, disable=not (shown and distributed.is_main())) as bar:

        def advance(samples: int) -> None:
            bar.update(min(samples * distributed.count(), total - int(bar.n)))

        yield advance
