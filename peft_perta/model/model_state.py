"""The user's model is borrowed: whatever happens, it goes back as it came."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch
from torch import nn

from .layers import find_kind
from .stack import switch_modules, tuner_modules


@contextmanager
def preserved(
    model: nn.Module, adapters: Sequence[str] | None = None, *, checkpointing: bool = False
) -> Iterator[None]:
    """Within the block the model is frozen and in eval mode, with these adapters on (None: as they are).

    On the way out, by any way: the same adapters on or off, requires_grad, train or eval mode of every module,
    bitsandbytes' lazily set compute types, and RNG states. Weights are never written.

    Args:
        adapters: names to turn on; an empty list turns every adapter off (theta_0).
        checkpointing: leave gradient checkpointing to work as the user set it up (transformers checkpoints only what is
            in training mode). Off for generation, where it would forbid the cache.
    """
    modules = list(model.modules())  # walked once: a large model has thousands
    training = [(module, module.training) for module in modules]
    parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}.values()
    frozen = [(parameter, parameter.requires_grad) for parameter in parameters]
    switched = [(m, m._active_adapter, m._disable_adapters) for m in tuner_modules(modules)]
    compute_types = [(m, m.compute_dtype, m.compute_type_is_set) for m in modules if "compute_type_is_set" in vars(m)]
    checkpointers = [
        (m, vars(m)["_gradient_checkpointing_func"]) for m in modules if "_gradient_checkpointing_func" in vars(m)
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                kind = find_kind(module)
                # A checkpointing module alone stays in training mode: its children's dropout is off.
                module.training = (kind is not None and kind.keeps_training_flag) or (
                    checkpointing and getattr(module, "gradient_checkpointing", False)
                )
            for module, checkpoint in checkpointers:
                if module.training:
                    vars(module)["_gradient_checkpointing_func"] = _in_eval_mode(module, checkpoint)
            if adapters is not None:
                switch_modules(modules, adapters)
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            # PEFT's setters also touch requires_grad and refuse some states that they accept; the two attributes are
            # the whole state of a switch (BaseTunerLayer and AuxiliaryTrainingWrapper both).
            for module, active, disabled in switched:
                module._active_adapter, module._disable_adapters = active, disabled
            for parameter, required in frozen:
                parameter.requires_grad_(required)
            for module, was_training in training:
                module.training = was_training
            for module, checkpoint in checkpointers:
                vars(module)["_gradient_checkpointing_func"] = checkpoint
            for module, dtype, is_set in compute_types:
                module.compute_dtype, module.compute_type_is_set = dtype, is_set


def _in_eval_mode(module: nn.Module, checkpoint: Callable) -> Callable:
    """Checkpoint as before, but in eval mode inside: some layers (OPT's) ask their own flag whether to drop out."""

    def checkpoint_in_eval_mode(function: Callable, *args: object, **kwargs: object) -> object:
        def in_eval_mode(*inputs: object, **named: object) -> object:
            module.training = False
            try:
                return function(*inputs, **named)
            finally:
                module.training = True

        return checkpoint(in_eval_mode, *args, **kwargs)

    return checkpoint_in_eval_mode


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Take note of the model's modules as they are now; the function that is returned puts them back.

    For code that is not ours and cleans up little (a trainer leaves hooks, checkpointing flags, a wrapped forward, a
    changed config): every module's attributes, hooks and mode, requires_grad, configs, and the random states that
    ``torch.random.fork_rng`` does not cover. Weights, and which modules there are, stay as they have become.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(vars(module), dict(vars(module))) for module in model.modules()]
    hooks = [
        (held, dict(held))
        for _, attributes in modules
        for name, held in attributes.items()
        if "_hooks" in name and isinstance(held, dict)
    ]
    configs = [copy[name] for _, copy in modules for name in ("config", "generation_config") if name in copy]
    fields = [(vars(config), dict(vars(config))) for config in configs if hasattr(config, "__dict__")]
    random_states = random.getstate(), numpy.random.get_state()

    def put_back() -> None:
        for held, copy in (*modules, *hooks, *fields):
            held.clear()
            held.update(copy)
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        random.setstate(random_states[0])
        numpy.random.set_state(random_states[1])

    return put_back
