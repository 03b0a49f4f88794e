"""Hidden states after each decoder block, at the tokens that predict a completion: read from a model, put into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...data import IGNORED, Batch
from ...errors import UnsupportedLayerError
from ...gradients import at_each_block, find_blocks, hidden_states
from ...model import sample_losses
from ..subject import Subject
from .stand_in import standing_in


def blocks_of(subject: Subject, attack: str) -> list[nn.Module]:
    """The model's decoder blocks.

    Raises:
        UnsupportedLayerError: it has none.
    """
    blocks = find_blocks(subject.model)
    if not blocks:
        raise UnsupportedLayerError(
            f"the {attack} attack reads the states after each decoder block: expected a list of alike blocks in "
            f"{type(subject.model).__name__}, found none; leave the attack out"
        )
    return blocks


def states_and_losses(model: nn.Module, blocks: list[nn.Module], batch: Batch) -> tuple[list[Tensor], Tensor]:
    """The states [K, H] after each block at the K tokens that predict one with loss, and the losses [N].

    Raises:
        UnsupportedLayerError: the blocks do not follow one another with one state for each token.
    """
    predicting = _predicting(batch)
    states: list[Tensor] = []

    def keep(index: int, output: Any) -> None:
        hidden = hidden_states(output)
        if index != len(states) or hidden.dim() != 3 or hidden.shape[:2] != predicting.shape:
            raise UnsupportedLayerError(
                f"{type(blocks[index]).__name__} number {index + 1}: expected blocks that follow one another, with one "
                f"state for each of {tuple(predicting.shape)} tokens, found {tuple(hidden.shape)}; leave out the "
                "attacks that read inner states"
            )
        states.append(hidden[predicting.to(hidden.device)])

    with at_each_block(blocks, after=keep):
        losses = sample_losses(model, batch)
    return states, losses


def losses_with(model: nn.Module, block: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    """The losses [N], nats per token, of a model whose states after a block are these [K, H] where a token predicts one
    with loss."""
    with _replaced(block, states, _predicting(batch)):
        return sample_losses(model, batch)


def losses_after_each(model: nn.Module, blocks: list[nn.Module], batch: Batch) -> Tensor:
    """The losses [N, L], nats per token, as what follows the last block reads them out of the states after each.

    One pass through the blocks; after it none of them runs.

    Raises:
        UnsupportedLayerError: as ``states_and_losses``.
    """
    outputs: list[Any] = []
    with at_each_block(blocks[-1:], after=lambda index, output: outputs.append(output)):
        states, losses = states_and_losses(model, blocks, batch)
    read = []
    for own in states[:-1]:
        output = _with_states(outputs[0], own, _predicting(batch))
        with ExitStack() as replaced:
            for block in blocks:
                replaced.enter_context(standing_in(block, lambda *args, output=output, **kwargs: output))
            read.append(sample_losses(model, batch))
    return torch.stack([*read, losses], 1)


def _predicting(batch: Batch) -> Tensor:
    """[N, T], true where the next token has a loss."""
    return nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))


@contextmanager
def _replaced(block: nn.Module, states: Tensor, where: Tensor) -> Iterator[None]:
    with torch.no_grad(), at_each_block([block], after=lambda index, output: _with_states(output, states, where)):
        yield


def _with_states(output: Any, states: Tensor, where: Tensor) -> Any:
    """A block's output with these states [K, H] at K tokens."""
    hidden = hidden_states(output)
    own = hidden.masked_scatter(where.to(hidden.device).unsqueeze(-1), states.to(hidden))
    return own if isinstance(output, Tensor) else (own, *output[1:])
