"""The description of one gradient computation. Everything in this room takes it, and nothing changes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..data import Sample
from ..model import Target
from .checkpoint import Checkpoint
from .collector import Collector
from .gradient_sums import GradientSums, StatisticName

SetSums = dict[str, dict[str, GradientSums]]  # set name -> layer name -> sums


@dataclass(frozen=True)
class Limits:
    """The most that a run may use.

    Attributes:
        batch_size: the most samples per forward and backward pass.
        max_memory: the most bytes on each GPU, the model included; None for nine tenths of what is free.
        host_memory: the same for the host's memory.
    """

    batch_size: int = 8
    max_memory: int | str | None = None
    host_memory: int | str | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """The gradient sums of some layers over some data sets.

    Attributes:
        model: the model; it is restored when the job ends.
        targets: the layers to sum gradients of.
        samples: set name -> its samples.
        collector: what is summed of each layer.
        statistic: 'mean' or 'squares': what is summed of the gradients.
        adapters: names of the adapters that are on while gradients are taken.
        limits: batch size and memory budgets.
        edit_copies: how many more copies of a layer's sums its edit needs in memory, beyond the three that every edit
            needs. The plan leaves room for them.
        checkpoint: where an interrupted run leaves its plan and its sums; None for no checkpoint.
        show_progress_bar: whether the main process shows progress bars.
    """

    model: nn.Module
    targets: Sequence[Target]
    samples: Mapping[str, list[Sample]]
    collector: Collector
    statistic: StatisticName
    adapters: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    edit_copies: int = 0
    checkpoint: Checkpoint | None = None
    show_progress_bar: bool = True

    def without(self, names: Collection[str]) -> Job:
        """The same job, less the layers of these names."""
        return replace(self, targets=[target for target in self.targets if target.name not in names])
