"""Layer by layer: one forward pass that keeps every block's input, then each block forward and backward by itself.

The loss's gradient at the last block's output comes with the forward pass. From the top down, each block then runs
again on its kept input, with its taps on, and the gradient at its output is propagated to its input, where it is the
gradient at the next lower block's output. In all this costs about two forward passes and one backward pass, and only
one block's sums are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch

from ...data import Batch
from ...model import DISK, HOST, Target, distributed, preserved
from .._chain_check import why_no_chain
from .._taps import Taps
from ..blocks import Chain, find_blocks
from ..gradient_sums import Place
from ..job import Job, SetSums
from ..passes import Advance, progress, shared_batches
from ..plan import (
    LayerCost,
    Measured,
    Memory,
    Plan,
    crossing_cost,
    names_of,
    peak_of_groups,
    priced,
    working_memory,
)
from .mode import Results

Step = Callable[[str, int], object]  # runs a batch, given its set's name and its number


class Layerwise:
    """One decoder block after the other, from the top down."""

    name = "layerwise"
    title = "layer by layer"

    def is_possible(self, measured: Measured) -> bool:
        """Whether the targets lie in blocks that run one after the other, or after them."""
        return measured.has_chain

    def plan(self, measured: Measured, memory: Memory, micro_batch: int, place: Place) -> Plan:
        """One group per block; ``place`` is where the blocks' inputs live."""
        working = working_memory(measured, measured.block_activations, micro_batch)
        groups = _groups(measured)
        peak = peak_of_groups(groups, working, memory.taken, "device")
        inputs = _input_bytes(measured, micro_batch, place)
        pool = {"device": next(iter(measured.activations)), "host": HOST, "disk": DISK}[place]
        peak[pool] = peak.get(pool, memory.taken.get(pool, 0)) + inputs
        depth = max(layer.after for layer in measured.layers) / measured.size
        cost = 1 + 2 * depth
        cost += measured.formed / measured.size
        # Each input is written once and read once; the gradient at the boundary is written and read at every block.
        moved = 4 * inputs
        how = f"layer by layer: {len(groups)} blocks, one after the other, their inputs kept on the {place}"
        return priced(
            Plan(self.name, names_of(groups), "device", place, micro_batch, (how,)),
            peak,
            memory.budget,
            cost + crossing_cost(measured, moved, place),
            measured,
        )

    def obstacle(self, job: Job) -> str | None:
        """Why the blocks, run one after the other, do not give the gradient of the whole model; None if they do."""
        return why_no_chain(job)

    def run(self, job: Job, plan: Plan) -> Results:
        """The layers after the blocks, then each block with a target, from the top down.

        A block without a layer of the job only propagates the gradient.
        """
        if not job.targets:
            return
        passes = _Passes(job, plan)
        with preserved(job.model, job.adapters), closing(passes.chain):
            samples = sum(map(len, job.samples.values()))
            with progress(samples, "forward on both sets", job.show_progress_bar) as advance:
                sums = passes.through(passes.above, passes.forward, advance)
            if passes.above:
                yield passes.above, sums
            steps = samples * (len(passes.inside) - passes.lowest)
            with progress(steps, "gradients, block by block", job.show_progress_bar) as advance:
                for index in reversed(range(passes.lowest, len(passes.inside))):
                    targets = passes.inside[index]
                    sums = passes.through(targets, partial(passes.back, index), advance)
                    if targets:
                        yield targets, sums


class _Passes:
    """The passes of one run over all batches of all sets.

    Attributes:
        inside: the targets of each block.
        above: the targets outside of all blocks.
        lowest: the index of the lowest block with a target.
        chain: the blocks from the lowest up, and what is kept for them.
    """

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job = job
        blocks = find_blocks(job.model)
        block_of = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
        self.inside: list[list[Target]] = [[] for _ in blocks]
        self.above: list[Target] = []
        for target in job.targets:
            index = block_of.get(id(target.base_layer))
            (self.above if index is None else self.inside[index]).append(target)
        self.lowest = min((index for index, targets in enumerate(self.inside) if targets), default=len(blocks))
        self.chain = Chain(job.model, blocks, self.lowest, plan.inputs_place)
        self._batches: dict[str, list[Batch]] = {
            set_name: shared_batches(samples, plan.micro_batch, job.model) for set_name, samples in job.samples.items()
        }

    def through(self, targets: list[Target], step: Step, advance: Advance) -> SetSums:
        """Run every batch of every set through ``step``, with taps on some targets."""
        sums: SetSums = {}
        for set_name, of_set in self._batches.items():
            with Taps(targets, self._job.collector, self._job.statistic) as taps:
                with distributed.failing_together(self._job.model), torch.enable_grad():
                    for number, batch in enumerate(of_set):
                        taps.begin(len(batch.indices))
                        step(set_name, number)
                        advance(len(batch.indices))
                taps.complete()
            taps.check(len(self._job.samples[set_name]), f"the {set_name} set")
            sums[set_name] = taps.sums
        return sums

    def forward(self, set_name: str, number: int) -> None:
        """Run a batch forward through the whole model, and backward to the last block's output."""
        self.chain.forward(self._batches[set_name][number], (set_name, number), f"the {set_name} set")

    def back(self, index: int, set_name: str, number: int) -> None:
        """Run a batch through one block again, and backward through it."""
        self.chain.back(index, (set_name, number), to_input=index > self.lowest)


def _groups(measured: Measured) -> list[list[LayerCost]]:
    """The layers of each block, from the top down; layers outside of the blocks come first."""
    by_block: dict[int, list[LayerCost]] = {}
    for layer in reversed(measured.layers):
        by_block.setdefault(measured.blocks if layer.block is None else layer.block, []).append(layer)
    return [by_block[block] for block in sorted(by_block, reverse=True)]


def _input_bytes(measured: Measured, micro_batch: int, place: Place) -> int:
    """Bytes of the inputs of all blocks from the lowest target up, and of the gradient at one boundary."""
    size = (measured.blocks - measured.lowest_block + 1) * measured.block_input + measured.arguments
    if place == "host" and not measured.on_host:  # pinned memory is allocated in powers of two
        of_batch = max(1.0, micro_batch * measured.block_input / measured.samples)
        size = int(size * 2 ** math.ceil(math.log2(of_batch)) / of_batch)
    return size
