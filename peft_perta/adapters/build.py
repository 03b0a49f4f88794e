"""Factors -> a plain LoRA adapter, on a model or in a directory. The only code that knows PEFT's file format.

The adapter is what every server takes: one rank, lora_alpha equal to it, no rsLoRA, no patterns, no bias, every layer
of a projection type present (zero where nothing changes). PEFT lays out the keys: it builds the empty adapter on a
weightless copy of the model, and we fill its slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import AdapterError, NumericalError
from ..model import base_model, base_name, check_new_name, weight_names, wrapped_kind
from .low_rank import Factors


def build_adapter(
    model: nn.Module, factors: Mapping[str, Factors], rank: int, dtype: torch.dtype, *, patterned: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA config and state dict of one uniform rank, from factors per layer name. The model is only looked at.

    Args:
        patterned: give each layer the rank of its factors instead, in PEFT's ``rank_pattern``; others have rank 1.

    Raises:
        NumericalError: a factor is not finite in ``dtype``.
    """
    base = base_model(model)
    modules = {path for path, _ in base.named_modules()}
    layers = [name for name in factors if name in modules]  # the other weights are experts', which are no modules
    projections = sorted({name.rpartition(".")[2] for name in layers})
    parameters = _expert_parameters(model) if len(layers) < len(factors) else []
    ranks = {name: factors[name].rank for name in layers} if patterned else {}
    rank = 1 if patterned else rank
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),  # every scaling is 1
        target_modules=projections,
        target_parameters=parameters or None,
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base_name(model),
    )
    with torch.device("meta"):
        skeleton = get_peft_model(type(base)(base.config), config)  # shapes only: no memory, no random numbers
    for path, module in skeleton.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        A: Any = module.lora_A["default"]
        B: Any = module.lora_B["default"]
        names = [name for name in weight_names(path, module) if name in factors]
        kind = wrapped_kind(module)
        if names and kind:
            padded = [factors[name].padded(ranks.get(name, rank)) for name in names]
            values = kind.pack([(weight.A, weight.B) for weight in padded])
        else:
            values = torch.zeros(A.weight.shape), torch.zeros(B.weight.shape)
        for slot, value in zip((A, B), values, strict=True):
            if slot.weight.shape != value.shape:
                raise AdapterError(
                    f"{path}: a factor of shape {tuple(value.shape)} for a slot of {tuple(slot.weight.shape)}; "
                    "is the model's config the one that it was built from?"
                )
            stored = value.detach().to("cpu", dtype).contiguous()
            if not bool(torch.isfinite(stored).all()):
                raise NumericalError(f"{path}: a factor is not finite in {dtype}; use dtype='bfloat16' or 'float32'")
            slot.weight = nn.Parameter(stored, requires_grad=False)
    saved = get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    state_dict = {key: value.detach() for key, value in saved.items()}
    config.base_model_name_or_path = base_name(model)
    # Lists: PEFT makes them sets, whose order is not that of two runs.
    config.target_modules, config.target_parameters = projections, parameters or None
    return config, state_dict


def _expert_parameters(model: Any) -> list[str]:
    """As the model's adapters spell them: PEFT stacks no adapter that spells them otherwise."""
    return sorted(next(config.target_parameters for config in model.peft_config.values() if config.target_parameters))


def add_adapter(model: nn.Module, config: LoraConfig, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Put the adapter on the model, frozen and not active; what is on stays on.

    Raises:
        AdapterError: the name is taken or dotted, or the state dict does not fit the model.
    """
    check_new_name(model, adapter_name)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng():  # PEFT draws the initial A, which is then overwritten
            if isinstance(model, PeftModel):
                model.add_adapter(adapter_name, config)
            else:
                active = model.active_adapters()  # type: ignore[operator]
                model.add_adapter(config, adapter_name)  # type: ignore[operator]
                model.set_adapter(active)  # type: ignore[operator]
        result = set_peft_model_state_dict(model, dict(state_dict), adapter_name=adapter_name)
        missing = [key for key in result.missing_keys if f".{adapter_name}." in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
    except (RuntimeError, ValueError) as error:  # PEFT's own, for shapes and for layers that are not there
        if adapter_name in model.peft_config:  # type: ignore[operator]
            model.delete_adapter(adapter_name)  # type: ignore[operator]
        raise AdapterError(
            f"the adapter does not fit this model: {' '.join(str(error).split())[:300]}; was it made for another "
            "architecture?"
        ) from error
    finally:
        for parameter, was_required in required:
            parameter.requires_grad_(was_required)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            parameter.requires_grad_(False)
