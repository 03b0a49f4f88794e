"""The ranks and dtypes that every LoRA server accepts."""

from __future__ import annotations

import torch

from ..errors import ConfigError

SERVABLE_RANKS = (8, 16, 32, 64, 128, 256)  # other ranks are zero-padded to the next one

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DTYPES = tuple(_TORCH_DTYPES)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in ``DTYPES``."""
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype without its prefix, for example 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def check_servable(rank: int, subject: str, remedy: str) -> None:
    """Refuse a rank above the largest one that servers accept.

    Args:
        rank: the rank that the adapter would have.
        subject: the start of the error message, up to the rank.
        remedy: the end of the error message: what to do instead.

    Raises:
        ConfigError: the rank is above the largest servable one.
    """
    if rank > SERVABLE_RANKS[-1]:
        raise ConfigError(f"{subject} {rank}, expected at most {SERVABLE_RANKS[-1]}; {remedy}")


def servable_rank(rank: int) -> int:
    """The smallest servable rank that is at least ``rank``.

    Raises:
        ConfigError: ``rank`` is above the largest servable one.
    """
    check_servable(
        rank,
        "the negative adapter would need rank",
        "ask for a smaller rank or energy share, or use granularity='factor', which keeps the forget adapter's rank",
    )
    return next(servable for servable in SERVABLE_RANKS if servable >= rank)
