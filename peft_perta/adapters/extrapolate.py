"""UIPE: go further along the way that an unlearning run has gone.

Reference: Wang et al. 2025, arXiv 2503.04693.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ..data import Sample
from ..errors import AdapterError, ConfigError, NumericalError
from ..evaluation import Goal, calibrate
from ..model import require_adapter
from .emitted import EmittedAdapter
from .fuse import check_ranks, combine_adapters


def extrapolate_adapter(
    model: nn.Module,
    adapter_name: str,
    alpha: float | Literal["auto"],
    *,
    start_adapter: str | None = None,
    goal: Goal | None = None,
    forget: list[Sample] | None = None,
    retain: list[Sample] | None = None,
    with_adapters: Sequence[str] = (),
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> EmittedAdapter:
    """theta_init + (1 + alpha) (theta_un - theta_init), as one plain LoRA adapter; exactly.

    An adapter that was trained from zero is scaled by 1 + alpha, at its own rank. One whose run began at another
    adapter P becomes (1 + alpha) of it minus alpha of P, at the ranks' sum.

    Args:
        model: carries the adapters; its own weights are needed for 'auto' alone.
        alpha: above -1; 0 is the adapter as it is. 'auto' searches along the line for ``goal``, by forward passes only.
        start_adapter: the adapter that the unlearning run began at; None where it began at zero.
        forget, retain: for 'auto': samples that judge, none of which the run was trained on, to be honest.
        with_adapters: for 'auto': what is on beside it, such as the task adapter.
        rank: truncate to it, with the error in the report; not with 'auto'.

    Returns:
        The config, the factors, and a report: the strengths of the parts, and for 'auto' the whole search.

    Raises:
        ConfigError: alpha is not finite or not above -1; 'auto' comes without goal or rows, or with a rank; or the
            ranks' sum is more than a server takes.
        AdapterError: an adapter is missing, is not plain LoRA, or is its own start.
        NumericalError: the goal cannot be met, nothing along the line forgets more than its start, or a factor is not
            finite.
    """
    require_adapter(model, adapter_name)
    if start_adapter is not None:
        require_adapter(model, start_adapter)
        if start_adapter == adapter_name:
            raise AdapterError(f"{adapter_name!r} is given as its own start; there is no way to go on along")
    found = None
    if alpha == "auto":
        if goal is None or not forget or not retain:
            raise ConfigError("alpha='auto' needs a goal, and forget and retain samples to judge by; or give a number")
        if rank is not None:
            raise ConfigError(
                "rank: expected none with alpha='auto', whose search is of the whole adapter; call again with the "
                "alpha that it finds, and the rank"
            )
        check_ranks(model, [adapter_name, *([start_adapter] if start_adapter else [])])
        found = calibrate(
            model, goal, forget, retain, adapter_name=adapter_name, start_adapter=start_adapter,
            with_adapters=with_adapters, batch_size=batch_size, show_progress_bar=show_progress_bar,
        )  # fmt: skip
        if not found.strength:
            raise NumericalError(
                f"nothing along the way of {adapter_name!r} forgets more than its start; is it an unlearning adapter?"
            )
        alpha = found.strength - 1
    if isinstance(alpha, str) or not math.isfinite(alpha) or alpha <= -1:
        raise ConfigError(f"alpha: expected 'auto' or a finite number above -1, found {alpha!r}")
    parts = {adapter_name: 1 + alpha}
    if start_adapter is not None:
        parts[start_adapter] = -alpha
    emitted = combine_adapters(model, parts, rank=rank, dtype=dtype)
    if found is not None:
        emitted = emitted.with_calibration(found)
    return emitted
