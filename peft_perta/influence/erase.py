"""LLMEraser: what an adapter would be if rows of its training set had been different or absent.

    delta_Phi = (1/n) (H + damping I)^-1 sum_S [ G(x, y) - G(x + dx, y + dy) ]

Phi are the adapter's factors, n is the number of training rows, H is the mean curvature of their losses, G is the loss
gradient of a row, and S are the rows that change. For a row that is removed there is no second term. The loss of a row
is the mean token loss of its completion, in eval mode.

Reference: Ding et al. 2024, arXiv 2412.00383. The system is solved by conjugate gradients instead of a few Adam steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..model import row_length
from ._changes import Pair, query_change, removal, response_change
from ._run import Run, check_adapters, solve
from .result import InfluenceResult
from .settings import InfluenceSettings


def erase_instances(
    model: nn.Module,
    training: Any,
    forget: Any,
    tokenizer: Any = None,
    *,
    adapter_name: str = "task",
    with_adapters: Sequence[str] = (),
    settings: InfluenceSettings | None = None,
    show_progress_bar: bool = True,
) -> InfluenceResult:
    """The adapter as if the forget rows, every copy of them, had not been in its training set.

    Args:
        model: carries the adapter, in floating point or quantised. It is left as it was; which adapters are active does
            not matter.
        training: all rows that the adapter was trained on: rows, a name that ``read_rows`` takes, a
            ``datasets.Dataset`` or a dataloader.
        forget: the rows of the training set to erase, in the same forms.
        tokenizer: needed where the data is text.
        adapter_name: the adapter that was trained on the rows.
        with_adapters: the adapters that were on beside it during its training.
        settings: how the system is built and solved; by default ``InfluenceSettings()``.
        show_progress_bar: show progress bars.

    Returns:
        The change of the adapter, which emits an edited adapter or a difference adapter.

    Raises:
        AdapterError, UnsupportedLayerError: the adapter cannot be edited, or the model cannot be differentiated as the
            curvature needs. Raised before any long computation.
        ConfigError: the model is sharded, an adapter is named twice, or the adapter's rank is above what servers
            accept.
        DataError: a set is malformed, a forget row is not in the training set, no other row is in it, or the adapter
            does not lower the loss on the training set and so was not trained on it.
        NumericalError: a loss or a product is not finite, or the Hessian is indefinite.

    Reference: arXiv 2412.00383, instance removal.
    """
    settings, max_length = _with_length(model, settings)
    targets = check_adapters(model, adapter_name, with_adapters)
    change = removal(training, forget, tokenizer, max_length)
    return solve(
        Run("erase_instances", model, targets, change, adapter_name, with_adapters, settings, show_progress_bar)
    )


def modify_queries(
    model: nn.Module,
    training: Any,
    changed: Sequence[Pair],
    tokenizer: Any,
    *,
    adapter_name: str = "task",
    with_adapters: Sequence[str] = (),
    settings: InfluenceSettings | None = None,
    show_progress_bar: bool = True,
) -> InfluenceResult:
    """The adapter as if some training rows had had other queries.

    Args:
        model: carries the adapter; see ``erase_instances``.
        training: all rows that the adapter was trained on; see ``erase_instances``.
        changed: pairs of a row of the training set and the same row with another query. Completions stay.
        tokenizer: turns the rows into tokens.
        adapter_name: the adapter that was trained on the rows.
        with_adapters: the adapters that were on beside it during its training.
        settings: how the system is built and solved; by default ``InfluenceSettings()``.
        show_progress_bar: show progress bars.

    Returns:
        The change of the adapter; see ``erase_instances``.

    Raises:
        PerTAError: as ``erase_instances``; and DataError also where a pair changes its completion.

    Reference: arXiv 2412.00383, query modification (dy = 0).
    """
    settings, max_length = _with_length(model, settings)
    targets = check_adapters(model, adapter_name, with_adapters)
    change = query_change(training, changed, tokenizer, max_length)
    return solve(
        Run("modify_queries", model, targets, change, adapter_name, with_adapters, settings, show_progress_bar)
    )


def correct_responses(
    model: nn.Module,
    training: Any,
    changed: Sequence[Pair],
    tokenizer: Any,
    *,
    adapter_name: str = "task",
    with_adapters: Sequence[str] = (),
    settings: InfluenceSettings | None = None,
    show_progress_bar: bool = True,
) -> InfluenceResult:
    """The adapter as if some training rows had had other completions.

    Args:
        model: carries the adapter; see ``erase_instances``.
        training: all rows that the adapter was trained on; see ``erase_instances``.
        changed: pairs of a row of the training set and the same row with another completion. Queries stay.
        tokenizer: turns the rows into tokens.
        adapter_name: the adapter that was trained on the rows.
        with_adapters: the adapters that were on beside it during its training.
        settings: how the system is built and solved; by default ``InfluenceSettings()``.
        show_progress_bar: show progress bars.

    Returns:
        The change of the adapter; see ``erase_instances``.

    Raises:
        PerTAError: as ``erase_instances``; and DataError also where a pair changes its query.

    Reference: arXiv 2412.00383, response correction (dx = 0).
    """
    settings, max_length = _with_length(model, settings)
    targets = check_adapters(model, adapter_name, with_adapters)
    change = response_change(training, changed, tokenizer, max_length)
    return solve(
        Run("correct_responses", model, targets, change, adapter_name, with_adapters, settings, show_progress_bar)
    )


def _with_length(model: nn.Module, settings: InfluenceSettings | None) -> tuple[InfluenceSettings, int]:
    """The settings, or the default ones, with the tokens of a sample filled in; and these."""
    settings = settings or InfluenceSettings()
    max_length = row_length(model, settings.max_length)
    return replace(settings, max_length=max_length), max_length
