"""Which adapters are plain LoRA: an unchanged base plus the delta scaling * B @ A."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

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


def check_lora_config(config: Any, adapter_name: str) -> None:
    """Check that an adapter's delta is scaling * B @ A on an unchanged base.

    Args:
        config: the adapter's PEFT config.
        adapter_name: its name in error messages.

    Raises:
        AdapterError: the adapter is no plain LoRA.
    """
    plain = "train the forget adapter with a plain LoraConfig"
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"adapter {adapter_name!r} is {type(config).__name__}, expected LoRA; {plain}")
    for field in VARIANT_FIELDS:
        if getattr(config, field, None):
            raise AdapterError(
                f"adapter {adapter_name!r} is a LoRA variant ({field}={getattr(config, field)!r}), whose delta is not "
                f"B @ A; {plain}"
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
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(
            f"adapter {adapter_name!r} was initialised with {init!r}, which rewrites the base weights; "
            "train it with init_lora_weights=True"
        )
