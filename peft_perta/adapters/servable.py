"""What every LoRA server takes: ranks and dtypes."""

from __future__ import annotations

import torch

from ..errors import ConfigError


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


SERVABLE_RANKS = (8, 16, 32, 64, 128, 256)  # the ranks that every LoRA server takes; others are zero-padded to the next


DTYPES = ("float32", "bfloat16", "float16")


def servable_rank(rank: int) -> int:
    """The smallest rank that every server takes and that holds ``rank``.

    Raises:
        ConfigError: the rank is above the largest servable one.
    """
    for servable in SERVABLE_RANKS:
        if rank <= servable:
            return servable
    raise ConfigError(
        f"the negative adapter would need rank {rank}, expected at most {SERVABLE_RANKS[-1]}; "
        "ask for a smaller rank or energy share, or use granularity='factor', which keeps the forget adapter's rank"
    )
