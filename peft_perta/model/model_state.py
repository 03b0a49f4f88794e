"""Leave a user's model as it was: ``preserved`` for the package's own code, ``snapshot`` for code of others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch
from torch import nn

from .distributed import reshard
from .layers import find_kind
from .stack import switch_modules, tuner_modules


@contextmanager
def preserved(
    model: nn.Module, adapters: Sequence[str] | None = None, *, checkpointing: bool = False
) -> Iterator[None]:
    """Within the block the model is frozen, in eval mode, with these adapters on; afterwards it is as it was.

    However the block ends, these are restored: which adapters are on, requires_grad, the training mode of every module,
    the compute types that bitsandbytes sets at the first forward, and torch's random state. Weights are never written.

    Args:
        model: the model, with or without adapters.
        adapters: the adapters to turn on; an empty list turns all of them off (the origin model), None leaves them as
            they are.
        checkpointing: keep gradient checkpointing as the user configured it; transformers checkpoints only modules in
            training mode. Leave it False for generation, where checkpointing would disable the KV cache.
    """
    modules = list(model.modules())  # walked once: a large model has thousands
    reshard(modules)  # a gathered parameter is not the one whose flag is to be restored
    training = [(module, module.training) for module in modules]
    gradient_flags = _gradient_flags(modules)
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
                # Only the checkpointing module itself stays in training mode: the dropout of its children is off.
                module.training = (kind is not None and kind.keeps_training_flag) or (
                    checkpointing and getattr(module, "gradient_checkpointing", False)
                )
            for module, checkpoint in checkpointers:
                if module.training:
                    vars(module)["_gradient_checkpointing_func"] = _in_eval_mode(module, checkpoint)
            if adapters is not None:
                switch_modules(modules, adapters)
            _set_gradient_flags((module, name, False) for module, name, _ in gradient_flags)
            yield
        finally:
            reshard(modules)
            # PEFT's setters also change requires_grad, and refuse some states that they accept elsewhere. The two
            # attributes are the whole state of a switch (of BaseTunerLayer and AuxiliaryTrainingWrapper).
            for module, active, disabled in switched:
                module._active_adapter, module._disable_adapters = active, disabled
            _set_gradient_flags(gradient_flags)
            for module, was_training in training:
                module.training = was_training
            for module, checkpoint in checkpointers:
                vars(module)["_gradient_checkpointing_func"] = checkpoint
            for module, dtype, is_set in compute_types:
                module.compute_dtype, module.compute_type_is_set = dtype, is_set


def _in_eval_mode(module: nn.Module, checkpoint: Callable) -> Callable:
    """The checkpoint function, with the module in eval mode inside: OPT's layers read their own flag for dropout."""

    def checkpoint_in_eval_mode(function: Callable, *args: object, **kwargs: object) -> object:
        def in_eval_mode(*inputs: object, **named: object) -> object:
            module.training = False
            try:
                return function(*inputs, **named)
            finally:
                module.training = True

        return checkpoint(in_eval_mode, *args, **kwargs)

    return checkpoint_in_eval_mode


def _gradient_flags(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, bool]]:
    """(module, name, requires_grad) of every parameter: accelerate replaces the parameters of an offloaded module."""
    return [
        (module, name, parameter.requires_grad)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _set_gradient_flags(flags: Iterable[tuple[nn.Module, str, bool]]) -> None:
    for module, name, required in flags:
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(required)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Record the state of the model's modules; the returned function restores it.

    For code of others that leaves traces, such as a trainer's hooks, checkpointing flags, wrapped forward and changed
    config. Restored are every module's attributes, hooks and mode, requires_grad and gradients, the configs, and the
    random states of Python and NumPy (``torch.random.fork_rng`` covers torch's). Weights, and which modules the model
    has, are not.
    """
    gradient_flags = _gradient_flags(model.modules())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    modules = [(vars(module), dict(vars(module))) for module in model.modules()]
    hooks = [
        (value, dict(value))
        for _, attributes in modules
        for name, value in attributes.items()
        if "_hooks" in name and isinstance(value, dict)
    ]
    configs = [copy[name] for _, copy in modules for name in ("config", "generation_config") if name in copy]
    fields = [(vars(config), dict(vars(config))) for config in configs if hasattr(config, "__dict__")]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()

    def restore() -> None:
        for live, copy in (*modules, *hooks, *fields):
            live.clear()
            live.update(copy)
        _set_gradient_flags(gradient_flags)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)

    return restore
