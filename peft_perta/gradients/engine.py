"""The engine: choose a plan for a job, and run it."""

from __future__ import annotations

import dataclasses
import gc
import sys

import torch
from tqdm.auto import tqdm

from ..model import budgets, distributed, held_to, taken
from ._planning import make_plan
from ._probe import measure
from .job import Job
from .modes import MODES
from .modes.mode import Results
from .plan import Plan


def choose_plan(job: Job) -> Plan:
    """The cheapest plan within the job's memory budget; a job that resumes from a checkpoint keeps its plan.

    Raises:
        ConfigError: no plan fits the budget.
    """
    budget = {"max_memory": job.limits.max_memory, "host_memory": job.limits.host_memory}
    with distributed.failing_together():
        entry = job.checkpoint.load("plan") if job.checkpoint is not None else None
    kept = distributed.from_main({} if entry is None else entry[1])
    plan = Plan.from_dict(kept["plan"]) if kept.get("limits") == budget else _new_plan(job)
    if job.checkpoint is not None:
        with distributed.failing_together():
            job.checkpoint.save("plan", {}, {"limits": budget, "plan": dataclasses.asdict(plan)})
    return plan


def gather(job: Job, plan: Plan) -> Results:
    """Run the plan: yields (targets, set name -> layer name -> sums) for each group; every target is in one group.

    When the GPU is out of memory, the micro-batch is halved and the remaining layers go on with it. The model is
    restored when the iterator is exhausted or closed; use ``contextlib.closing``.

    Raises:
        NumericalError: a loss or a sum is not finite, or a sum is incomplete.
        torch.OutOfMemoryError: a single sample does not fit.
    """
    with held_to(dict(plan.budget)):
        while True:
            try:
                for targets, sums in MODES[plan.mode].run(job, plan):
                    yield targets, sums
                    job = job.without({target.name for target in targets})
                return
            except torch.OutOfMemoryError as error:
                if plan.micro_batch == 1 or distributed.is_sharded(job.model):
                    raise
                smaller = plan.micro_batch // 2
                reason = str(error).splitlines()[0]
                _tell(f"out of memory with {plan.micro_batch} samples at a time ({reason}); continuing with {smaller}")
                plan = dataclasses.replace(plan, micro_batch=smaller)
            # Not in the handler: its traceback would keep the tensors of the batch that did not fit.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _new_plan(job: Job) -> Plan:
    with distributed.failing_together(job.model):
        measured = measure(job)
    measured = dataclasses.replace(  # each process keeps the inputs of its own batches only
        measured,
        block_input=measured.block_input // distributed.count(),
        arguments=measured.arguments // distributed.count(),
    )
    limits = job.limits
    budget = budgets(measured.activations, limits.max_memory, limits.host_memory, distributed.count_here())
    in_use = {pool: taken(pool) for pool in budget}
    modes = dict(MODES)
    while True:
        with distributed.failing_together():
            plan = make_plan(measured, in_use, budget, limits.batch_size, modes)
        plan = distributed.from_main(plan)
        with distributed.failing_together(job.model):
            obstacle = modes[plan.mode].obstacle(job)
        obstacle = distributed.from_main(obstacle)
        if obstacle is None:
            return plan
        _tell(f"{modes.pop(plan.mode).title} is not possible ({obstacle}); planning {_titles(modes)} instead")


def _titles(modes) -> str:
    return " or ".join(mode.title for mode in modes.values())


def _tell(line: str) -> None:
    if distributed.is_main():
        tqdm.write(line, file=sys.stderr)
