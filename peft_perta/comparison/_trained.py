"""Methods that train an adapter to forget, from zero or from one that another method made."""

from __future__ import annotations

from typing import Any

from ..adapters import add_adapter
from ..data import load_samples
from ..training import (
    ForwardPass,
    UnlearningSettings,
    default_lora_config,
    train_unlearning,
)
from ._edits import Make
from ._method import Made, Setup

STEPS = 30  # on the shipped model about as far as the retain-only model; SAGO, at 2e-3 (its steps are smaller)


_START = "perta_start"


_BATCH = 10


def trained(start: Make | None = None, *, learning_rate: float = 1e-3, **knobs: Any) -> Make:
    """On top of the task adapter; the knobs are those of UnlearningSettings.

    Args:
        start: makes the adapter that this one begins as.
    """
    settings = UnlearningSettings(**knobs)

    def make(setup: Setup) -> Made:
        began = start(setup) if start is not None else None
        if began is not None:
            add_adapter(setup.model, began.lora_config, began.state_dict, _START)
        try:
            lora_config, state_dict, _ = train_unlearning(
                setup.model,
                setup.forget_rows,
                setup.retain_rows,
                setup.tokenizer,
                settings,
                task_adapter="task",
                start_adapter=_START if began is not None else None,
                lora_config=None if began is not None else default_lora_config(setup.rank),
                show_progress_bar=False,
                max_steps=STEPS,
                learning_rate=learning_rate,
                warmup_steps=0.05,
                per_device_train_batch_size=_BATCH,
                logging_strategy="no",
                seed=setup.seed,
            )
        finally:
            if began is not None:
                setup.model.delete_adapter(_START)
        cost = _cost(setup, settings) + (began.forward_equivalents if began is not None else 0.0)
        return Made(lora_config, state_dict, cost)

    return make


def _cost(setup: Setup, settings: UnlearningSettings) -> float:
    """A forward and backward of each sample of a step, and a forward of the reference model where a loss reads it."""
    rows = {"forget": setup.forget_rows, "retain": setup.retain_rows}
    once, spent = 0, 0.0
    for name, loss in settings.losses.items():
        tokens = sum(len(sample.input_ids) for sample in load_samples(rows[name], setup.tokenizer, name=name))
        passes = STEPS * _BATCH / len(rows[name])
        once += tokens
        spent += passes * tokens * (2 + (ForwardPass.REFERENCE in loss.reads))
    return spent / once
