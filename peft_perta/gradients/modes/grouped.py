"""Sweeps over groups of layers: for each group, all samples run forward, and backward to the group's lowest layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from ...model import base_model, distributed, preserved
from .._taps import Taps
from ..gradient_sums import GradientSums, Place
from ..job import Job, SetSums
from ..partial_sums import load_sums, save_sums
from ..passes import progress, run_backward, shared_batches
from ..plan import (
    GroupSums,
    LayerCost,
    Measured,
    Memory,
    Plan,
    crossing_cost,
    names_of,
    peak_of_groups,
    priced,
    within,
    working_memory,
)
from .mode import Results


class Grouped:
    """One sweep per group of layers, from the top group down."""

    name = "grouped"
    title = "in sweeps"

    def is_possible(self, measured: Measured) -> bool:
        """Always: a sweep is an ordinary forward and backward pass."""
        return True

    def plan(self, measured: Measured, memory: Memory, micro_batch: int, place: Place) -> Plan:
        """Groups as large as the budget allows; ``place`` is where their sums live."""
        working = working_memory(measured, measured.activations, micro_batch)
        groups = _groups(measured, working, memory, place)
        cost = 0.0
        for group in groups:
            depth = max(layer.after for layer in group) / measured.size
            cost += 1 + depth * (2 if measured.recomputes else 1)
        cost += measured.formed / measured.size
        passes = measured.samples / micro_batch
        moved = 0 if place == "device" else passes * sum(layer.sum_bytes for layer in measured.layers)
        names = names_of(groups)
        return priced(
            Plan(self.name, names, place, "device", micro_batch, _described(names)),
            peak_of_groups(groups, working, memory.taken, place),
            memory.budget,
            cost + crossing_cost(measured, moved, place),
            measured,
        )

    def obstacle(self, job: Job) -> None:
        """None: a sweep runs the model as its author wrote it."""
        return None

    def run(self, job: Job, plan: Plan) -> Results:
        """The plan's groups, from the top down; with a checkpoint, one set's sums outlast an interruption."""
        by_name = {target.name: target for target in job.targets}
        last_set = list(job.samples)[-1]
        for number, names in enumerate(plan.groups, start=1):
            group = [by_name[name] for name in names if name in by_name]
            if not group:
                continue
            count = f", group {number} of {len(plan.groups)}" if len(plan.groups) > 1 else ""
            sums: SetSums = {}
            for set_name in job.samples:
                of_set = load_sums(job, group, set_name, plan.sums_place)
                if of_set is None:
                    label = f"the {set_name} set{count}"
                    job_of_group = replace(job, targets=group)
                    of_set = sweep(job_of_group, set_name, plan.micro_batch, place=plan.sums_place, label=label)
                    if set_name != last_set:
                        save_sums(job, set_name, of_set)
                sums[set_name] = of_set
            yield group, sums


def sweep(
    job: Job, set_name: str, micro_batch: int, *, place: Place = "device", label: str | None = None
) -> dict[str, GradientSums]:
    """One pass over one set of a job: layer name -> its gradient sums.

    The loss is ``sample_losses``, summed over samples. Gradients are taken in eval mode with ``job.adapters`` on; the
    model is restored afterwards. Several processes share the batches, and all get the same sums.

    Args:
        job: the job; its checkpoint is not used.
        set_name: the set, a key of ``job.samples``.
        micro_batch: the number of samples that run together.
        place: where the sums live.
        label: the set's name in messages and in the progress bar; by default 'the <set_name> set'.

    Raises:
        NumericalError: a sample's loss or a layer's sums are not finite.
    """
    samples, label = job.samples[set_name], label or f"the {set_name} set"
    taps = Taps(job.targets, job.collector, job.statistic, place)
    with (
        preserved(job.model, job.adapters, checkpointing=True),
        taps,
        _checkpointed_segments_pass_gradients(job.model),
        distributed.failing_together(job.model),
        torch.enable_grad(),
        _whole_recomputations(job.model),
        progress(len(samples), f"gradients on {label}", job.show_progress_bar) as advance,
    ):
        for batch in shared_batches(samples, micro_batch, job.model):
            taps.begin(len(batch.indices))
            run_backward(job.model, batch, label)
            advance(len(batch.indices))
    taps.complete()
    taps.check(len(samples), label)
    return taps.sums


def _groups(measured: Measured, working: dict[str, int], memory: Memory, place: Place) -> list[list[LayerCost]]:
    """The layers' groups, top group first, each group's top layer first.

    They are filled from the bottom up: this gives the fewest sweeps, and each goes back no further than it must.
    """
    groups: list[list[LayerCost]] = []
    sums = GroupSums()
    for layer in measured.layers:
        larger = sums.plus(layer)
        if groups and within(larger.peak(working, memory.taken, place), memory.budget):
            sums = larger
            groups[-1].append(layer)
        else:
            sums = GroupSums().plus(layer)
            groups.append([layer])
    return [group[::-1] for group in reversed(groups)]


def _described(groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    if len(groups) == 1:
        return ("1 sweep",)
    sweeps = [
        f"sweep {number}: {len(group)} layers, {group[0]} to {group[-1]}"
        for number, group in enumerate(groups, start=1)
    ]
    return f"{len(groups)} sweeps from the top down", *sweeps


@contextmanager
def _checkpointed_segments_pass_gradients(model: nn.Module) -> Iterator[None]:
    """Reentrant gradient checkpointing passes gradients only to segments whose input requires one."""
    handles = []
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        embeddings = base_model(model).get_input_embeddings()  # type: ignore[operator]
        handles.append(embeddings.register_forward_hook(_require_gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole_recomputations(model: nn.Module) -> AbstractContextManager:
    """Gradient checkpointing stops a recomputation early; on an offloaded model that would leave a weight on its
    execution device. So an offloaded model recomputes each segment to its end."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return set_checkpoint_early_stop(False) if offloaded else nullcontext()


def _require_gradient(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_(True)
