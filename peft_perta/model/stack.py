"""Which adapters of a model are on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import AdapterError


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Name -> PEFT config of every adapter on the model, whether PEFT or transformers attached it.

    Raises:
        AdapterError: the model carries no adapter at all.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(
            f"expected a model with PEFT adapters, found a {type(model).__name__} without any; attach them with "
            "PeftModel.from_pretrained(model, directory, adapter_name=...)"
        )
    return dict(configs)


def require_adapter(model: nn.Module, name: str) -> Any:
    """The config of the adapter of that name.

    Raises:
        AdapterError: no adapter is so named.
    """
    configs = adapter_configs(model)
    if name not in configs:
        raise AdapterError(f"no adapter named {name!r}; the model has {sorted(configs)}")
    return configs[name]


def stack_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Turn on exactly these adapters, together, for inference: their deltas add up.

    PEFT's ``set_adapter`` takes one name, and silently drops the unlearning when it names the task adapter alone; call
    this again after any ``set_adapter``.

    Raises:
        AdapterError: a name is missing on the model, is given twice, or none is given.
    """
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise AdapterError(f"expected a list of distinct adapter names, found {names!r}")
    for name in names:
        require_adapter(model, name)
    if isinstance(model, PeftModel):
        model.base_model.enable_adapter_layers()  # type: ignore[operator]
        model.base_model.set_adapter(list(names), inference_mode=True)  # type: ignore[operator]
    else:  # attached by transformers' own PEFT integration
        model.enable_adapters()  # type: ignore[operator]
        model.set_adapter(list(names))  # type: ignore[operator]
        for module in tuner_modules(model.modules()):
            module.set_adapter(list(names), inference_mode=True)


def tuner_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Those whose behaviour depends on which adapters are on."""
    return [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def switch_modules(modules: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Turn on these adapters (none: all off), layer by layer; the model's own record of what is on stays as it was."""
    for module in tuner_modules(modules):
        if isinstance(module, BaseTunerLayer):
            present = list(names)
        else:
            present = [name for name in names if name in module._adapters]
        module.enable_adapters(bool(present))
        if present:
            module.set_adapter(present, inference_mode=True)


@contextmanager
def adapter_strength(model: nn.Module, name: str, factor: float) -> Iterator[None]:
    """Within the block, the adapter's delta is ``factor`` times what it is: a scalar a layer, nothing is rebuilt.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    require_adapter(model, name)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.scaling]
    scalings = [layer.scaling[name] for layer in layers]
    try:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[name] = scaling * factor
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[name] = scaling


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuse a name that PEFT or a loader would trip over.

    Raises:
        AdapterError: the name is empty, dotted or taken.
    """
    if not name or "." in name:
        raise AdapterError(f"expected an adapter name without dots, found {name!r}; try 'perta_unlearn'")
    if name in (getattr(model, "peft_config", None) or {}):
        raise AdapterError(
            f"an adapter named {name!r} is on the model already; choose another adapter_name, or delete_adapter it"
        )
