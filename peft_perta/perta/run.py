"""PerTA: weight the forget adapter parameter by parameter, negate it, and emit it as plain LoRA.

With weighting='uniform' this is plain task arithmetic (Ilharco et al. 2023, arXiv 2212.04089).

Reference: Cai et al. 2026, arXiv 2601.22030.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import EmittedAdapter, PerTAProvenance
from ..model import check_new_name
from ._description import describe, with_checkpoint
from ._emission import calibrated, check_goal, emit, with_fit_kl
from .config import PerTAConfig
from .edited_layers import edit


def add_perta_adapter(
    model: nn.Module,
    config: PerTAConfig,
    forget: Any = None,
    retain: Any = None,
    *,
    forget_adapter: str = "forget",
    adapter_name: str = "perta_unlearn",
    task_adapter: str | None = None,
    tokenizer: Any = None,
    checkpoint_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> PerTAProvenance:
    """Make the negative adapter and put it on the model, beside its other adapters; it is not active yet.

    Turn it on with ``stack_adapters``. The arguments are those of ``get_perta_state_dict``, which explains them at more
    length, and ``adapter_name``.

    Args:
        model: the model, with the forget adapter on it.
        config: the settings.
        forget: the data to forget.
        retain: the data to keep.
        forget_adapter: the name of the forget adapter.
        adapter_name: the name of the new adapter, without dots.
        task_adapter: the name of the task adapter, if any.
        tokenizer: needed where data is text.
        checkpoint_dir: where an interrupted run leaves its results.
        show_progress_bar: whether to show the plan and progress bars.

    Returns:
        How the adapter was made.

    Raises:
        AdapterError: also if the name is taken or has a dot; other errors as ``get_perta_state_dict``.
    """
    check_new_name(model, adapter_name)
    emitted = get_perta_state_dict(
        model,
        config,
        forget,
        retain,
        forget_adapter=forget_adapter,
        task_adapter=task_adapter,
        tokenizer=tokenizer,
        checkpoint_dir=checkpoint_dir,
        show_progress_bar=show_progress_bar,
    )
    emitted.add_to(model, adapter_name)
    return emitted.provenance


def get_perta_state_dict(
    model: nn.Module,
    config: PerTAConfig,
    forget: Any = None,
    retain: Any = None,
    *,
    forget_adapter: str = "forget",
    task_adapter: str | None = None,
    tokenizer: Any = None,
    checkpoint_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> EmittedAdapter:
    """Make the negative adapter as a LoRA config and a state dict; the model is left as it was.

    If ``torch.distributed`` is initialised, every process must call this: they share the data, and each gets the whole
    result.

    Args:
        model: a model with the forget adapter on it, in float, 8 bit or 4 bit; it does not matter which adapters are
            active.
        config: the settings.
        forget: the data to forget: a dataloader, a ``datasets.Dataset``, a list of rows, or a name that
            ``read_rows`` takes. Only ``weighting="uniform"`` does without data.
        retain: the data to keep, likewise.
        forget_adapter: the name of the adapter that was trained on the forget set alone, on the origin model.
        task_adapter: the name of the adapter that turns the origin model into the full model. Needed for
            ``gradients_at="full"`` and ``strength="auto"``, unless the base alone is the full model.
        tokenizer: needed where data is text.
        checkpoint_dir: a directory where an interrupted run leaves its results; the same call resumes from it. It is
            not deleted when the run is done.
        show_progress_bar: whether to show the plan and progress bars.

    Returns:
        The adapter; it unpacks to its LoRA config, its state dict and its provenance.

    Raises:
        ConfigError: the run does not fit ``max_memory`` and ``host_memory``, or the model is sharded.
        AdapterError, UnsupportedLayerError: the forget adapter cannot be negated; raised before any computation.
        DataError: a set is missing, empty or malformed, or both sets are the same.
        NumericalError: a loss, gradient or factor is not finite.
        OutputError: ``checkpoint_dir`` belongs to another run, or cannot be written.
    """
    data = {"forget": forget, "retain": retain}
    run = describe(model, config, data, tokenizer, forget_adapter, task_adapter, show_progress_bar)
    check_goal(run)
    run = with_checkpoint(run, checkpoint_dir)
    edits = edit(run)
    return calibrated(run, with_fit_kl(run, emit(run, edits), edits))
