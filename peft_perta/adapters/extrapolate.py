"""UIPE: extrapolate an unlearning run beyond the point where it stopped.

Reference: Wang et al. 2025, arXiv 2503.04693.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from ..data import Sample
from ..errors import AdapterError, ConfigError, NumericalError
from ..evaluation import Calibration, Goal, calibrate
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
    served: nn.Module | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> EmittedAdapter:
    """theta_start + (1 + alpha) (theta_end - theta_start) as one plain LoRA adapter, exactly.

    An adapter that was trained from zero is scaled by 1 + alpha and keeps its rank. An adapter whose training started
    from another one becomes (1 + alpha) of itself minus alpha of its start; its rank is the sum of both ranks.

    Args:
        model: carries the adapters; its own weights are needed only for 'auto' without ``served``.
        adapter_name: the adapter at the end of the unlearning run.
        alpha: how far to go, above -1; 0 gives the adapter itself. 'auto' searches for the ``goal`` by forward passes.
        start_adapter: the adapter that the unlearning run started from; None where it started at zero.
        goal: what 'auto' must reach.
        forget: forget samples for 'auto'; the run must not have been trained on them.
        retain: retain samples for 'auto'; likewise.
        with_adapters: adapters that are on during the search, such as the task adapter.
        served: the same base in the form in which it will be served (``load_served``), with the same adapters: 'auto'
            searches there. None searches on ``model``.
        rank: truncate the result to this rank; the provenance holds the error. Not with 'auto'.
        dtype: of the emitted factors.
        batch_size: samples per forward pass of the search.
        show_progress_bar: show a progress bar during the search.

    Returns:
        The adapter; its provenance holds the strengths of the parts and, for 'auto', the whole search.

    Raises:
        ConfigError: alpha is not finite or not above -1; 'auto' has no goal or no samples, or has a rank; or the sum
            of the ranks is above what servers accept.
        AdapterError: an adapter is missing, is not plain LoRA, or is its own start.
        NumericalError: the search cannot meet the goal, or a factor is not finite.
    """
    line = _line(model, adapter_name, start_adapter)
    calibration = None
    if alpha == "auto":
        _check_untruncated(model, line, rank)
        search = partial(
            calibrate, served or model, adapter_name=adapter_name, start_adapter=start_adapter,
            with_adapters=with_adapters, batch_size=batch_size, show_progress_bar=show_progress_bar,
        )  # fmt: skip
        calibration = _search(search, adapter_name, goal, forget, retain)
        alpha = calibration.strength - 1
    emitted = combine_adapters(model, _strengths(line, alpha), rank=rank, dtype=dtype)
    return emitted if calibration is None else emitted.with_calibration(calibration)


def _line(model: nn.Module, adapter_name: str, start_adapter: str | None) -> list[str]:
    """The adapters that span the line: the end of the run, and its start where it has one."""
    require_adapter(model, adapter_name)
    if start_adapter is None:
        return [adapter_name]
    require_adapter(model, start_adapter)
    if start_adapter == adapter_name:
        raise AdapterError(
            f"adapter {adapter_name!r} is its own start, expected another adapter; leave start_adapter out if the run "
            "started at zero"
        )
    return [adapter_name, start_adapter]


def _check_untruncated(model: nn.Module, line: Sequence[str], rank: int | None) -> None:
    if rank is not None:
        raise ConfigError(
            f"rank: expected none with alpha='auto', which searches with the adapter at its whole rank, found {rank}; "
            "call again with the alpha that the search finds, and with the rank"
        )
    check_ranks(model, line)


def _search(
    search: Callable[[Goal, list[Sample], list[Sample]], Calibration],
    adapter_name: str,
    goal: Goal | None,
    forget: list[Sample] | None,
    retain: list[Sample] | None,
) -> Calibration:
    if goal is None or not forget or not retain:
        raise ConfigError("alpha='auto' needs a goal, forget samples and retain samples; pass them, or a number")
    calibration = search(goal, forget, retain)
    if not calibration.strength:
        raise NumericalError(
            f"no adapter on the line through {adapter_name!r} forgets more than the start; check that it is an "
            "unlearning adapter"
        )
    return calibration


def _strengths(line: Sequence[str], alpha: float | str) -> dict[str, float]:
    """Adapter -> its factor in the extrapolated sum."""
    if isinstance(alpha, str) or not math.isfinite(alpha) or alpha <= -1:
        raise ConfigError(f"alpha: expected 'auto' or a finite number above -1, found {alpha!r}")
    return dict(zip(line, (1 + alpha, -alpha), strict=False))
