"""The adapter in training: put on the model, given another adapter's factors, and taken off again."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..errors import AdapterError
from ..model import base_name, check_decoder
from .settings import LoraSettings


def default_lora_config(rank: int = 16) -> LoraConfig:
    """Plain LoRA on every linear layer except the output head, with ``lora_alpha = 2 * rank``.

    Args:
        rank: R, the rank of every layer.
    """
    return LoraSettings(rank).to_lora_config()


def with_new_adapter(model: nn.Module, lora_config: LoraConfig, adapter_name: str) -> PeftModel:
    """The model with one more adapter, the only one that is on.

    Raises:
        ConfigError: the model is an encoder-decoder.
        AdapterError: PEFT refuses the config for this model, as it does if it names layers that the model lacks.
    """
    wrapped = isinstance(model, PeftModel)
    check_decoder(model)
    try:
        if wrapped:
            model.add_adapter(adapter_name, lora_config)
            model.set_adapter(adapter_name)
        else:
            model = get_peft_model(model, lora_config, adapter_name=adapter_name)  # type: ignore[arg-type]
    except (ValueError, re.error) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"no adapter can be made with this LoraConfig: {reason} Change the setting, or choose other layers with "
            "target_modules and exclude_modules (--target-modules, --exclude-modules)"
        ) from error
    model.peft_config[adapter_name].base_model_name_or_path = base_name(model)  # PEFT names the path of the cache
    return model


def copy_factors(model: PeftModel, source: str, destination: str) -> None:
    """Give one adapter the delta of another, at the strength that the other has on the model.

    A direction whose row of A and column of B are both zero keeps the destination's A: with both at zero, both
    gradients would be zero, and it could never learn. Experts' factors are packed and are copied as they are.
    """
    for layer in model.modules():
        if not (isinstance(layer, LoraLayer) and source in layer.lora_A):
            continue
        factors: Any = {name: (layer.lora_A[name], layer.lora_B[name]) for name in (destination, source)}
        A, B = (factor.weight.data for factor in factors[destination])
        source_A, source_B = (factor.weight.data for factor in factors[source])
        unused = ~source_A.any(1) & ~source_B.any(0) if not isinstance(layer, ParamWrapper) else None
        A.copy_(source_A if unused is None else torch.where(unused.unsqueeze(1), A, source_A))
        B.copy_(source_B * (layer.scaling[source] / layer.scaling[destination]))
