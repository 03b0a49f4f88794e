"""Both sets' gradient statistics, as a plan has it. The only code that runs backward and owns hooks.

Two modes, one row each in ``MODES``: a job and the two sets in; out, group after group from the top, the targets of the
group with both sets' statistics.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import Sample
from ..model import Target, budgets, distributed, held_to, taken
from ._probe import measure, why_no_chain
from .checkpoint import Checkpoint
from .gradient_sums import StatisticName
from .input_moments import Collector
from .job import Job, SetSums
from .modes import MODES
from .plan import Plan, make_plan


@dataclass(frozen=True)
class Limits:
    """What a run may take.

    Attributes:
        batch_size: the most samples per forward and backward.
        max_memory: the most bytes of each GPU, the model included; None: nine tenths of what is free.
        host_memory: the same of the host.
    """

    batch_size: int = 8
    max_memory: int | str | None = None
    host_memory: int | str | None = None


def choose_plan(
    model: nn.Module,
    targets: Sequence[Target],
    sets: Mapping[str, list[Sample]],
    collector: Collector,
    limits: Limits,
    statistic: StatisticName,
    adapters: list[str],
    edit_copies: int = 0,
    checkpoint: Checkpoint | None = None,
) -> Plan:
    """The cheapest plan within the config's memory budget; a run that goes on from a checkpoint keeps to its plan.

    Raises:
        ConfigError: no plan keeps within the budget.
    """
    memory = {"max_memory": limits.max_memory, "host_memory": limits.host_memory}
    with distributed.failing_together():
        kept = checkpoint.load("plan") if checkpoint is not None else None
        if kept is not None and kept[1]["limits"] == memory:
            plan = Plan.from_dict(kept[1]["plan"])
        else:
            plan = _new_plan(model, targets, sets, collector, limits, statistic, adapters, edit_copies)
    plan = distributed.from_main(plan)
    if checkpoint is not None:
        with distributed.failing_together():
            checkpoint.save("plan", {}, {"limits": memory, "plan": dataclasses.asdict(plan)})
    return plan


def _new_plan(
    model: nn.Module,
    targets: Sequence[Target],
    sets: Mapping[str, list[Sample]],
    collector: Collector,
    limits: Limits,
    statistic: StatisticName,
    adapters: list[str],
    edit_copies: int,
) -> Plan:
    measured = measure(model, targets, sets, collector, statistic, adapters, limits.batch_size, edit_copies)
    measured = dataclasses.replace(  # each process keeps the inputs of its own batches
        measured,
        block_input=measured.block_input // distributed.count(),
        arguments=measured.arguments // distributed.count(),
    )
    budget = budgets(measured.activations, limits.max_memory, limits.host_memory, distributed.count_here())
    held = {pool: taken(pool) for pool in budget}
    plan = make_plan(measured, held, budget, limits.batch_size)
    if plan.mode == "layerwise":
        reason = why_no_chain(model, sets, adapters)
        if reason is not None:
            if distributed.is_main():
                tqdm.write(f"layer by layer is not possible ({reason}); planning sweeps instead", file=sys.stderr)
            plan = make_plan(dataclasses.replace(measured, blocks=0), held, budget, limits.batch_size)
    return plan


def gather(job: Job, sets: dict[str, list[Sample]]) -> Generator[tuple[list[Target], SetSums], None, None]:
    """Run the job: (targets, set name -> layer name -> statistic) of each group; every target is in one group.

    Out of memory: the micro-batch is halved, and what is not done yet is done with that. The model goes back as it
    came when the iterator is closed, by any way; use ``contextlib.closing``.

    Raises:
        NumericalError: a loss or a statistic is not finite, or incomplete.
        torch.OutOfMemoryError: one sample alone does not fit.
    """
    with held_to(dict(job.plan.budget)):
        while True:
            try:
                for targets, found in MODES[job.plan.mode](job, sets):
                    yield targets, found
                    job.done.update(target.name for target in targets)
                return
            except torch.OutOfMemoryError as error:
                if job.plan.micro_batch == 1:
                    raise
                smaller = job.plan.micro_batch // 2
                if distributed.is_main():
                    tqdm.write(
                        f"out of memory with {job.plan.micro_batch} samples at a time ({str(error).splitlines()[0]}); "
                        f"going on with {smaller}",
                        file=sys.stderr,
                    )
                job.plan = dataclasses.replace(job.plan, micro_batch=smaller)
            # Outside of the handler, whose traceback would hold the tensors of the batch that did not fit.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
