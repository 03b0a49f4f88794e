"""Hidden states after each decoder block, at the tokens that predict a completion: read from a model, put into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...data import IGNORED, Batch
from ...errors import UnsupportedLayerError
from ...gradients import at_each_block, find_blocks, hidden_states
from ...model import sample_losses
from ..subject import Subject


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


def _predicting(batch: Batch) -> Tensor:
    """[N, T], true where the next token has a loss."""
    return nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))


@contextmanager
def _replaced(block: nn.Module, states: Tensor, where: Tensor) -> Iterator[None]:
    def replace(index: int, output: Any) -> Any:
        hidden = hidden_states(output)
        own = hidden.masked_scatter(where.to(hidden.device).unsqueeze(-1), states.to(hidden))
        return own if isinstance(output, Tensor) else (own, *output[1:])

    with torch.no_grad(), at_each_block([block], after=replace):
        yield
