"""How many tokens a model takes: the default length of a row, and what is left for an answer."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..data import is_count, note
from ..errors import ConfigError, DataError
from .stack import base_model

DEFAULT_LENGTH = 1024  # tokens of a row

_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
_TABLE = re.compile("wpe|pos")  # in the path of a table with a row for each position: GPT-2's wpe, embed_positions
_OTHER = re.compile("vision|visual|image|audio")  # in the path of a tower that reads no text
_MOST_SPARE = 8  # rows of a table beyond its positions, such as OPT's 2


def row_length(model: nn.Module, max_length: int | None, *, default: int = DEFAULT_LENGTH) -> int:
    """The most tokens of a row.

    Args:
        model: the model that reads the rows.
        max_length: what the user asks for; None for the default.
        default: the default, which is lowered to the number of positions that the model was trained for.

    Raises:
        ConfigError: ``max_length`` is below 2, or the model has a table of positions, with fewer than that.
    """
    if max_length is None:
        return min(default, _positions(model) or default)
    if not is_count(max_length) or max_length < 2:
        raise ConfigError(
            f"max_length: expected an int from 2, a token and the one that it predicts, found {max_length!r}"
        )
    table = table_length(model)
    if table is not None and max_length > table:
        raise ConfigError(
            f"max_length: expected at most {table}, the number of positions in the model's table, found {max_length}; "
            "longer rows are cut there, or split where they are text"
        )
    return max_length


def fitting_new_tokens(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> int:
    """``max_new_tokens``, or as many as a table of positions has left after the longest prompt.

    Args:
        model: the model that answers.
        prompts: the token ids of each prompt.
        max_new_tokens: the most tokens of an answer.

    Raises:
        DataError: no position is left after a prompt; the message names its row.
    """
    table = table_length(model)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]), default=None)
    if table is None or longest is None:
        return max_new_tokens
    left = table - len(prompts[longest])
    if left < 1:
        raise DataError(
            f"row {longest + 1}: its prompt has {len(prompts[longest])} tokens, expected fewer than {table}, the "
            "positions in the model's table, so that an answer fits; shorten the prompt"
        )
    if left < max_new_tokens:
        note(
            f"answers have at most {left} tokens instead of {max_new_tokens}: the model's table has {table} positions, "
            f"and the longest prompt takes {len(prompts[longest])}"
        )
    return min(left, max_new_tokens)


def table_length(model: nn.Module) -> int | None:
    """The number of positions in the model's table; None for a model without one (rotary, ALiBi, recurrent)."""
    positions = _positions(model)
    if positions is None:
        return None
    base = base_model(model)
    tables = [*base.named_parameters(), *base.named_buffers()]
    sizes = {
        tensor.shape[0]
        for name, tensor in tables
        if tensor.dim() == 2 and _TABLE.search(name) and not _OTHER.search(name)
    }
    return positions if any(positions <= size <= positions + _MOST_SPARE for size in sizes) else None


def _positions(model: nn.Module) -> int | None:
    """The number of positions in the config of the language model; None where it states none."""
    config: Any = getattr(base_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = [getattr(config, key, None) for key in _KEYS]
    return next((value for value in values if isinstance(value, int) and value > 1), None)
