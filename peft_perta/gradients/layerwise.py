"""Layer by layer: one forward that keeps every block's input, then each block forward and back by itself.

The loss's gradient at the last block's output comes with the forward. From the top down, a block's input goes through
it again, with its taps on, the gradient at its output goes back, and the gradient at its input takes that one's place.
About two forwards and one backward in all, and one block's sums at a time.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..borrow import borrowed
from ..data import Batch, Sample, batches
from ..losses import sample_losses
from ..targets import Target
from .blocks import Call, Shelf, at_each_block, find_blocks, first_tensor, hidden_states
from .job import Job, SetStatistics, check_losses, input_device, progress
from .tap import Taps


def layerwise(job: Job, sets: dict[str, list[Sample]]) -> Generator[tuple[list[Target], SetStatistics], None, None]:
    """The blocks that are not done yet, from the top; each with both sets' statistics.

    Blocks above that are done already only pass their gradient on.
    """
    blocks = find_blocks(job.model)
    members = [{id(module) for module in block.modules()} for block in blocks]
    wanted = [target for target in job.targets.values() if target.name not in job.done]
    inside = [[target for target in wanted if id(target.base_layer) in ids] for ids in members]
    above = [target for target in wanted if not any(target in found for found in inside)]
    lowest = min((index for index, found in enumerate(inside) if found), default=len(blocks))
    if not wanted:
        return
    share = {name: processes.share(list(batches(found, job.plan.micro_batch))) for name, found in sets.items()}
    inputs, gradients = Shelf(job.plan.inputs), Shelf(job.plan.inputs)
    try:
        with borrowed(job.model, job.adapters):
            calls: dict[tuple[str, int], list[Call]] = {}
            found: SetStatistics = {}
            for name, samples in sets.items():
                with Taps(above, job.granularity, job.statistic) as taps:
                    with (
                        processes.failing_together(),
                        torch.enable_grad(),
                        progress(len(samples), f"forward on the {name} set", job.show_progress_bar) as advance,
                    ):
                        for number, batch in enumerate(share[name]):
                            taps.batch_samples = len(batch.indices)
                            calls[name, number] = forward(
                                job.model, blocks, lowest, batch, (name, number), inputs, gradients, f"the {name} set"
                            )
                            advance(len(batch.indices))
                    taps.add_up()
                    taps.check(len(samples), f"the {name} set")
                    found[name] = taps.statistics
            if above:
                yield above, found
            with progress(
                sum(map(len, sets.values())) * (len(blocks) - lowest),
                "gradients, block by block",
                job.show_progress_bar,
            ) as advance:
                for index in reversed(range(lowest, len(blocks))):
                    found = {}
                    for name, samples in sets.items():
                        with Taps(inside[index], job.granularity, job.statistic) as taps:
                            with processes.failing_together(), torch.enable_grad():
                                for number, batch in enumerate(share[name]):
                                    taps.batch_samples = len(batch.indices)
                                    key = name, number
                                    hidden = inputs.get((key, index)).requires_grad_(index > lowest)
                                    output = calls[key][index - lowest].again(blocks[index], hidden)
                                    output.backward(gradients.get(key))
                                    if index > lowest:
                                        gradients.put(key, hidden.grad)  # type: ignore[arg-type]
                                    inputs.drop((key, index))
                                    advance(len(batch.indices))
                            taps.add_up()
                            taps.check(len(samples), f"the {name} set")
                            found[name] = taps.statistics
                    if inside[index]:
                        yield inside[index], found
    finally:
        inputs.close()
        gradients.close()


def forward(
    model: nn.Module,
    blocks: list[nn.Module],
    lowest: int,
    batch: Batch,
    key: Any,
    inputs: Shelf,
    gradients: Shelf,
    name: str,
) -> list[Call]:
    """Run a batch forward: its inputs to the blocks from ``lowest`` up, and the loss's gradient at the last block's
    output, go to their shelves. How those blocks were called is returned.

    Nothing below the last block's output requires a gradient, so no graph is built there.
    """
    calls = []
    shelved: dict[int, Tensor] = {}

    def before(index: int, args: tuple, kwargs: dict) -> None:
        if index >= lowest:
            inputs.put((key, index), first_tensor(args, kwargs))
            calls.append(Call(args, kwargs, inputs, key, shelved))

    last: list[Tensor] = []

    def after(index: int, output: Any) -> Any:
        if index < len(blocks) - 1:
            return None
        last.append(hidden_states(output).detach().requires_grad_(True))
        return last[0] if isinstance(output, Tensor) else (last[0], *output[1:])

    with at_each_block(blocks, before, after):
        losses = sample_losses(model, batch.to(input_device(model)))
    check_losses(losses, batch, name)
    losses.sum().backward()
    gradients.put(key, last[0].grad)  # type: ignore[arg-type]
    return calls
