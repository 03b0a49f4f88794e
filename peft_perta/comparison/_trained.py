"""Methods that train an adapter to forget, from zero or from the adapter of another method."""

from __future__ import annotations

from typing import Any

from ..adapters import add_adapter
from ..data import load_samples
from ..model import row_length
from ..training import (
    UnlearningSettings,
    default_lora_config,
    train_unlearning,
)
from .method import WARMUP, MakeAdapter, MethodAdapter, Setup

# On the shipped model, about as far as the retain-only model; SAGO needs a learning rate of 2e-3, as its steps are
# smaller.
STEPS = 30
_START = "perta_start"
BATCH = 10


def trained(
    start: MakeAdapter | None = None, *, learning_rate: float = 1e-3, rounds: int = 1, **options: Any
) -> MakeAdapter:
    """Train an adapter on top of the task adapter. The options are the fields of UnlearningSettings.

    Args:
        start: the method whose adapter the training starts from; None to start from zero.
        learning_rate: of the training.
        rounds: train for this many times ``STEPS``.
    """
    settings = UnlearningSettings(**options)

    def make(setup: Setup) -> MethodAdapter:
        start_adapter = start(setup) if start is not None else None
        if start_adapter is not None:
            add_adapter(setup.model, start_adapter.lora_config, start_adapter.state_dict, _START)
        try:
            lora_config, state_dict, _ = train_unlearning(
                setup.model,
                setup.forget_rows,
                setup.retain_rows,
                setup.tokenizer,
                settings,
                task_adapter=setup.task_adapter,
                start_adapter=_START if start_adapter is not None else None,
                lora_config=None if start_adapter is not None else default_lora_config(setup.rank),
                show_progress_bar=False,
                max_steps=rounds * STEPS,
                learning_rate=learning_rate,
                warmup_steps=WARMUP,
                per_device_train_batch_size=BATCH,
                logging_strategy="no",
                seed=setup.seed,
            )
        finally:
            if start_adapter is not None:
                setup.model.delete_adapter(_START)
        started = start_adapter.forward_equivalents if start_adapter is not None else 0.0
        cost = rounds * _cost(setup, settings) + started
        return MethodAdapter(lora_config, state_dict, cost)

    return make


def _cost(setup: Setup, settings: UnlearningSettings) -> float:
    """Forward-equivalents of ``STEPS`` steps: a forward and backward pass (2) of each sample of a step, and a forward
    pass (1) of each frozen model that a loss reads; for an attacker, forward and backward again (2) of the forget rows.
    """
    rows = {"forget": setup.forget_rows, "retain": setup.retain_rows}
    length = row_length(setup.model, None)
    both_sets, spent = 0, 0.0
    for name, loss in settings.losses.items():
        samples = load_samples(rows[name], setup.tokenizer, max_length=length, name=name)
        tokens = sum(len(sample.input_ids) for sample in samples)
        epochs = STEPS * BATCH / len(rows[name])
        both_sets += tokens
        attack = 2 if name == "forget" and settings.relearning_steps else 0
        spent += epochs * tokens * (2 + attack + sum(forward_pass.is_frozen for forward_pass in loss.reads))
    return spent / both_sets
