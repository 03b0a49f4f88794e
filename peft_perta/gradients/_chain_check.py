"""A test on the model: do the decoder blocks, run one after the other, give the gradient of the whole model?"""

from __future__ import annotations

from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..data import Batch, batches
from ..model import input_device, preserved, sample_losses
from .blocks import Chain, at_each_block, find_blocks, first_tensor
from .job import Job


def why_no_chain(job: Job) -> str | None:
    """The reason why running block by block does not give the whole model's gradient; None if it does.

    The gradient of the shortest sample's loss at the first block's input is computed both ways and compared.
    """
    sample = min((s for samples in job.samples.values() for s in samples), key=lambda s: len(s.input_ids))
    batch = next(batches([sample], 1)).to(input_device(job.model))
    with preserved(job.model, job.adapters), torch.enable_grad():
        whole = _gradient_of_the_whole(job, batch)
        by_blocks = _gradient_by_blocks(job, batch)
    if isinstance(by_blocks, str):
        return by_blocks
    if whole is None or whole.shape != by_blocks.shape:
        return "the model as a whole passes no gradient to its first block"
    error = float((whole.double() - by_blocks.double()).norm() / whole.double().norm().clamp_min(1e-300))
    if not error < (1e-3 if whole.dtype in (torch.float32, torch.float64) else 3e-2):
        return f"block by block the gradient differs by {error:.1%}: blocks share more than their hidden states"
    return None


def _gradient_of_the_whole(job: Job, batch: Batch) -> Tensor | None:
    """The loss's gradient at the first block's input."""
    entered: list[Tensor] = []

    def before(index: int, args: tuple, kwargs: dict) -> Any:
        if index:
            return None
        entered.append(first_tensor(args, kwargs).detach().requires_grad_(True))
        if args:
            return (entered[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": entered[0]}

    offloaded = any(parameter.is_meta for parameter in job.model.parameters())
    # The graph would keep every weight of an offloaded model on the GPU.
    saving = torch.autograd.graph.save_on_cpu() if offloaded else nullcontext()
    with at_each_block(find_blocks(job.model), before), saving:
        sample_losses(job.model, batch).sum().backward()
    return entered[0].grad


def _gradient_by_blocks(job: Job, batch: Batch) -> Tensor | str:
    """The same gradient, one block at a time; or why there is none."""
    blocks = find_blocks(job.model)
    key = "sample"
    with closing(Chain(job.model, blocks, 0, "device")) as chain:
        chain.forward(batch, key, "the shortest sample")
        if len(chain.calls[key]) != len(blocks):
            return f"{len(blocks)} blocks were called {len(chain.calls[key])} times"
        gradient = None
        for index in reversed(range(len(blocks))):
            gradient = chain.back(index, key, to_input=True)
            if gradient is None:
                return f"no gradient reaches the input of block {index}"
    return "the model has no decoder blocks" if gradient is None else gradient
