"""The adapters of a model: which exist, which are on, and how strong each is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import AdapterError, ConfigError

EXPECTED_DECODER = (
    "expected a decoder that continues text, such as Llama, Qwen or GPT-2, which AutoModelForCausalLM loads"
)
"""What messages that refuse another kind of model ask for."""


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Name -> PEFT config of every adapter on the model, attached by PEFT or by transformers.

    Raises:
        AdapterError: the model carries no adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(
            f"expected a model with PEFT adapters, found a {type(model).__name__} without any; attach them with "
            "PeftModel.from_pretrained(model, directory, adapter_name=...)"
        )
    return dict(configs)


def require_adapter(model: nn.Module, name: str) -> Any:
    """The PEFT config of an adapter.

    Raises:
        AdapterError: the model has no adapter of this name.
    """
    configs = adapter_configs(model)
    if name not in configs:
        raise AdapterError(f"no adapter named {name!r}; the model has {sorted(configs)}")
    return configs[name]


def check_decoder(model: nn.Module) -> None:
    """Refuse an encoder-decoder model, such as T5 or BART: its loss is not that of a text that goes on.

    Raises:
        ConfigError: the model has an encoder.
    """
    base = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"{type(base).__name__} is an encoder-decoder model; {EXPECTED_DECODER}")


def stack_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Turn on exactly these adapters for inference; their deltas add up.

    PEFT's ``set_adapter`` takes one name. Called with the task adapter, it silently turns the negative adapter off:
    call ``stack_adapters`` again after every ``set_adapter``.

    Args:
        model: a model with adapters, attached by PEFT or by transformers.
        names: the adapters to turn on; all others are turned off.

    Raises:
        AdapterError: no name is given, a name is given twice, or the model has no such adapter.
    """
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise AdapterError(f"expected a list of distinct adapter names, found {names!r}")
    for name in names:
        require_adapter(model, name)
    if isinstance(model, PeftModel):
        model.base_model.enable_adapter_layers()  # type: ignore[operator]
        model.base_model.set_adapter(list(names), inference_mode=True)  # type: ignore[operator]
    else:  # transformers' own PEFT integration attached them
        model.enable_adapters()  # type: ignore[operator]
        model.set_adapter(list(names))  # type: ignore[operator]
        for module in tuner_modules(model.modules()):
            module.set_adapter(list(names), inference_mode=True)


def tuner_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules whose output depends on which adapters are on."""
    return [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def switch_modules(modules: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Turn on exactly these adapters in these modules. The model's own record of the active adapters is unchanged.

    Args:
        modules: the modules of the model.
        names: the adapters to turn on; if empty, all are turned off.
    """
    for module in tuner_modules(modules):
        if isinstance(module, BaseTunerLayer):
            active = list(names)
        else:
            active = [name for name in names if name in module._adapters]
        module.enable_adapters(bool(active))
        if active:
            module.set_adapter(active, inference_mode=True)


@contextmanager
def adapter_strength(model: nn.Module, name: str, factor: float) -> Iterator[None]:
    """Within the block the adapter's delta is multiplied by ``factor``. Only one scalar per layer changes.

    Raises:
        AdapterError: the model has no adapter of this name.
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


def give_memory(model: nn.Module, name: str) -> None:
    """Give memory on the host to those of an adapter's factors that PEFT put on the meta device.

    PEFT puts a factor where the weight beside it is, and loads nothing into it where that is the meta device (an
    offloaded model, a skeleton). A factor that accelerate offloads by a hook of its own is left alone.

    Args:
        model: carries the adapter, whose weights are not loaded yet.
        name: the adapter.
    """
    for path, module in model.named_modules():
        if "lora_" not in path or hasattr(module, "_hf_hook"):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and name in (path.rpartition(".")[2], key):
                memory = torch.empty_like(parameter, device="cpu")
                module._parameters[key] = nn.Parameter(memory, requires_grad=parameter.requires_grad)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_new_name(model: nn.Module, name: str) -> None:
    """Check that a new adapter name is valid and free.

    PEFT finds an adapter's factors by its name in their paths: no part of a path may be called like it.

    Raises:
        AdapterError: the name is empty, contains a dot, is taken, or is that of a module or of a module's attribute.
    """
    if not name or "." in name:
        raise AdapterError(f"expected an adapter name without dots, found {name!r}; try 'perta_unlearn'")
    if name in (getattr(model, "peft_config", None) or {}):
        raise AdapterError(
            f"an adapter named {name!r} is on the model already; choose another adapter_name, or delete that adapter "
            "with delete_adapter"
        )
    parts = {part for path, _ in model.named_modules() for part in path.split(".")}
    if name in parts or name.startswith("lora_") or hasattr(nn.ModuleDict, name):
        raise AdapterError(
            f"expected an adapter name that is no part of the model, found {name!r}, which PEFT would confuse with a "
            "module; try 'perta_unlearn'"
        )


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take the adapter off the model, even if it was added only in part; unwrap the layers that have no other one.

    Which adapters are on stays, and so does the model's own record of them, which PEFT would overwrite.
    """
    carries = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)  # not a wrapped base
    if carries and adapter_name in model.peft_config:  # type: ignore[operator]
        recorded = vars(model).get("active_adapter")
        model.delete_adapter(adapter_name)  # type: ignore[operator]
        if recorded is not None and adapter_name not in ([recorded] if isinstance(recorded, str) else recorded):
            model.active_adapter = recorded  # type: ignore[assignment]
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(model, PeftModel):
            module.delete_adapter(adapter_name)
        is_nested = name.endswith(".base_layer")  # it is removed with the wrapper around it
        if not module._get_available_adapters() and not is_nested:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
