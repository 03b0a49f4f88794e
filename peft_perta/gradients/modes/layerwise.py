"""Layer by layer: one forward that keeps every block's input, then each block forward and back by itself.

The loss's gradient at the last block's output comes with the forward. From the top down, a block's input goes through
it again, with its taps on, the gradient at its output goes back, and the gradient at its input takes that one's place.
About two forwards and one backward in all, and one block's sums at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial

import torch

from ...data import Sample, batches
from ...model import Target, distributed, preserved
from .._taps import Taps
from ..blocks import Chain, find_blocks
from ..job import Advance, Job, SetSums, progress


def run(job: Job, sets: dict[str, list[Sample]]) -> Generator[tuple[list[Target], SetSums], None, None]:
    """The blocks that are not done yet, from the top; each with both sets' statistics.

    Blocks above that are done already only pass their gradient on.
    """
    blocks = find_blocks(job.model)
    wanted = [target for target in job.targets.values() if target.name not in job.done]
    home = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    inside: list[list[Target]] = [[] for _ in blocks]
    above = []
    for target in wanted:
        index = home.get(id(target.base_layer))
        (above if index is None else inside[index]).append(target)
    lowest = min((index for index, found in enumerate(inside) if found), default=len(blocks))
    if not wanted:
        return
    shared = {name: distributed.share(list(batches(found, job.plan.micro_batch))) for name, found in sets.items()}

    def through(targets: list[Target], step: Callable[[str, int], object], advance: Advance) -> SetSums:
        """All batches of both sets, by set and number, with taps on some targets."""
        found = {}
        for name, of_set in shared.items():
            with Taps(targets, job.collector, job.statistic) as taps:
                with distributed.failing_together(), torch.enable_grad():
                    for number, batch in enumerate(of_set):
                        taps.batch_samples = len(batch.indices)
                        step(name, number)
                        advance(len(batch.indices))
                taps.add_up()
            taps.check(len(sets[name]), f"the {name} set")
            found[name] = taps.statistics
        return found

    samples = sum(map(len, sets.values()))
    with preserved(job.model, job.adapters), closing(Chain(job.model, blocks, lowest, job.plan.inputs)) as chain:

        def forward(name: str, number: int) -> None:
            chain.forward(shared[name][number], (name, number), f"the {name} set")

        with progress(samples, "forward on both sets", job.show_progress_bar) as advance:
            found = through(above, forward, advance)
        if above:
            yield above, found
        steps = samples * (len(blocks) - lowest)
        with progress(steps, "gradients, block by block", job.show_progress_bar) as advance:
            for index in reversed(range(lowest, len(blocks))):
                back = partial(chain.back, index, to_input=index > lowest)
                found = through(inside[index], lambda name, number, back=back: back((name, number)), advance)
                if inside[index]:
                    yield inside[index], found
