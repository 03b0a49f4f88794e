"""Which adapters are plain LoRA: an unchanged base plus the delta scaling * B @ A."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftType

from ..data import is_count, is_int, is_number
from ..errors import AdapterError

# These inits rewrite the base weights: the adapter's delta is then not what training learned.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Config fields that are only set for variants whose delta is not B @ A.
VARIANT_FIELDS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
    "layer_replication",
)

_KNOWN_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


def check_config_values(values: Any, file: str) -> None:
    """Check the content of an adapter_config.json: PEFT drops fields that it does not know, and checks no value.

    Args:
        values: the parsed content.
        file: its name in error messages.

    Raises:
        AdapterError: it is of another kind of adapter, or a field is unknown and set, or has a value of another type.
    """
    if not isinstance(values, dict):
        raise AdapterError(f"{file} holds a {type(values).__name__}, expected an object; save the adapter again")
    kind = values.get("peft_type")
    if kind != PeftType.LORA.value:
        found = f"an adapter of the peft_type {kind!r}" if kind else "no peft_type"
        raise AdapterError(f"{file}: expected a LoRA adapter (peft_type 'LORA'), found {found}; {_REMEDY}")
    unknown = next((name for name, value in values.items() if value and name not in _KNOWN_FIELDS), None)
    if unknown is not None:
        raise AdapterError(
            f"{file}: {unknown} = {values[unknown]!r} is a field that the installed PEFT does not know and would "
            f"ignore, though it may change what the adapter does; upgrade PEFT, or {_REMEDY}"
        )
    for name, (expected, accepts) in _VALUES.items():
        if name in values and not accepts(values[name]):
            raise AdapterError(f"{file}: {name}: expected {expected}, found {values[name]!r}; correct it")


def check_lora_config(config: Any, adapter_name: str) -> None:
    """Check that an adapter's delta is scaling * B @ A on an unchanged base.

    Args:
        config: the adapter's PEFT config.
        adapter_name: its name in error messages.

    Raises:
        AdapterError: the adapter is no plain LoRA.
    """
    if getattr(config, "peft_type", None) != PeftType.LORA:  # AdaLoRA's config is a LoraConfig too
        raise AdapterError(f"adapter {adapter_name!r} is {type(config).__name__}, expected LoRA; {_REMEDY}")
    init = config.init_lora_weights
    variants = {field: getattr(config, field, None) for field in VARIANT_FIELDS}
    variants["init_lora_weights"] = init if init == "mica" else None
    for field, value in variants.items():
        if value:
            raise AdapterError(
                f"adapter {adapter_name!r} is a LoRA variant ({field}={value!r}), whose delta is not B @ A; {_REMEDY}"
            )
    if getattr(config, "lora_bias", False) or config.bias != "none":
        raise AdapterError(
            f"adapter {adapter_name!r} trains biases (bias={config.bias!r}, lora_bias={config.lora_bias}), which a "
            'negative LoRA cannot hold; train it with bias="none", lora_bias=False'
        )
    if config.modules_to_save:
        raise AdapterError(
            f"adapter {adapter_name!r} saves whole modules {list(config.modules_to_save)}, which cannot be negated; "
            "train it without modules_to_save (TRL adds them by itself when a chat template adds tokens)"
        )
    if config.trainable_token_indices:
        raise AdapterError(
            f"adapter {adapter_name!r} trains token embeddings (trainable_token_indices), which cannot be negated; "
            "train it without (TRL adds them by itself when a chat template adds tokens)"
        )
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(
            f"adapter {adapter_name!r} was initialised with {init!r}, which rewrites the base weights; "
            "train it with init_lora_weights=True"
        )


_REMEDY = "train it with a plain LoraConfig"


def _each(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(accepts, value.values()))


def _is_scale(value: Any) -> bool:
    return is_number(value) and value != 0


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_indices(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(is_int, value)))


# Field -> what it holds, and whether a value is that.
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an int above 0", is_count),
    "lora_alpha": ("a finite number other than 0", _is_scale),
    "rank_pattern": ("an int above 0 for each name", _each(is_count)),
    "alpha_pattern": ("a finite number other than 0 for each name", _each(_is_scale)),
    "target_modules": (
        "a list of names or a regular expression",
        lambda value: isinstance(value, str) or _are_names(value),
    ),
    "exclude_modules": (
        "a list of names or a regular expression",
        lambda value: isinstance(value, str) or _are_names(value),
    ),
    "layers_to_transform": ("an index or a list of them", lambda value: is_int(value) or _are_indices(value)),
    "layers_pattern": ("a name or a list of names", lambda value: isinstance(value, str) or _are_names(value)),
    "target_parameters": ("a list of names", _are_names),
    "modules_to_save": ("a list of names", _are_names),
    "init_lora_weights": ("true, false or a name", lambda value: value is None or isinstance(value, (bool, str))),
    "bias": ("'none'", lambda value: isinstance(value, str)),
}
