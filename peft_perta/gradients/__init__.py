"""Both sets' gradient statistics, as a plan has it. The only code that runs backward and owns hooks.

Two modes, one row each in ``MODES``: a job and the two sets in; out, group after group from the top, the targets of the
group with both sets' statistics.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import processes
from ..checkpoint import Checkpoint
from ..config import PerTAConfig
from ..data import Sample
from ..memory import budgets, held_to, taken
from ..moments import Reader
from ..plan import Plan, make_plan
from ..statistics import StatisticName
from ..targets import Target
from . import grouped, layerwise
from .grouped import sweep
from .job import Job, SetStatistics
from .probe import measure, why_no_chain

MODES = {"grouped": grouped.run, "layerwise": layerwise.run}


def choose_plan(
    model: nn.Module,
    targets: Sequence[Target],
    sets: Mapping[str, list[Sample]],
    reader: Reader,
    config: PerTAConfig,
    statistic: StatisticName,
    adapters: list[str],
    checkpoint: Checkpoint | None = None,
) -> Plan:
    """The cheapest plan within the config's memory budget; a run that goes on from a checkpoint keeps to its plan.

    Raises:
        ConfigError: no plan keeps within the budget.
    """
    limits = {"max_memory": config.max_memory, "host_memory": config.host_memory}
    with processes.failing_together():
        kept = checkpoint.load("plan") if checkpoint is not None else None
        if kept is not None and kept[1]["limits"] == limits:
            plan = Plan.from_dict(kept[1]["plan"])
        else:
            plan = _new_plan(model, targets, sets, reader, config, statistic, adapters)
    plan = processes.from_main(plan)
    if checkpoint is not None:
        with processes.failing_together():
            checkpoint.save("plan", {}, {"limits": limits, "plan": dataclasses.asdict(plan)})
    return plan


def _new_plan(
    model: nn.Module,
    targets: Sequence[Target],
    sets: Mapping[str, list[Sample]],
    reader: Reader,
    config: PerTAConfig,
    statistic: StatisticName,
    adapters: list[str],
) -> Plan:
    copies = 0 if config.input_directions is False and config.fit in (None, "truncated") else 7
    measured = measure(model, targets, sets, reader, statistic, adapters, config.batch_size, copies)
    measured = dataclasses.replace(  # each process keeps the inputs of its own batches
        measured,
        block_input=measured.block_input // processes.count(),
        arguments=measured.arguments // processes.count(),
    )
    budget = budgets(measured.activations, config.max_memory, config.host_memory, processes.count_here())
    held = {pool: taken(pool) for pool in budget}
    plan = make_plan(measured, held, budget, config.batch_size)
    if plan.mode == "layerwise":
        reason = why_no_chain(model, sets, adapters)
        if reason is not None:
            if processes.is_main():
                tqdm.write(f"layer by layer is not possible ({reason}); planning sweeps instead", file=sys.stderr)
            plan = make_plan(dataclasses.replace(measured, blocks=0), held, budget, config.batch_size)
    return plan


def gather(job: Job, sets: dict[str, list[Sample]]) -> Generator[tuple[list[Target], SetStatistics], None, None]:
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
                if processes.is_main():
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


__all__ = ["MODES", "Job", "choose_plan", "gather", "measure", "sweep", "why_no_chain"]
