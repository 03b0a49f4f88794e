"""Factors -> the config and state dict of a plain LoRA adapter, and such an adapter -> onto a model.

Every server takes the adapter: it has one rank, ``lora_alpha`` equal to that rank, no rsLoRA, no patterns and no bias,
and it covers every layer of a projection type, with zeros where nothing changes. PEFT lays out the keys: it builds the
empty adapter on a copy of the model without weights, and we fill its slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import AdapterError, NumericalError
from ..model import (
    base_model,
    base_name,
    check_new_name,
    give_memory,
    remove_adapter,
    snapshot,
    weight_names,
    wrapped_kind,
)
from .low_rank import Factors


def build_adapter(
    model: nn.Module, factors: Mapping[str, Factors], rank: int, dtype: torch.dtype, *, patterned: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Build a LoRA config and state dict of one rank.

    Args:
        model: the model that the adapter is for; it is not changed.
        factors: target name -> factors of its edit.
        rank: the rank of the adapter; factors are zero-padded to it.
        dtype: of the emitted factors.
        patterned: give each layer the rank of its own factors, in PEFT's ``rank_pattern``; layers without factors get
            rank 1, and ``rank`` is ignored.

    Returns:
        PEFT's config, and PEFT's keys -> factors.

    Raises:
        AdapterError: a factor's shape does not fit the model's config.
        NumericalError: a factor is not finite in ``dtype``.
    """
    base = base_model(model)
    modules = [path for path, _ in base.named_modules() if ".base_layer" not in path and ".lora_" not in path]
    layers = [name for name in factors if name in modules]  # the other weights are experts', which are no modules
    ranks = {name: factors[name].rank for name in layers} if patterned else {}
    rank = 1 if patterned else rank
    projections = _target_names(layers, modules)
    parameters = _expert_parameters(model) if len(layers) < len(factors) else None
    config = _plain_config(rank, ranks, projections, parameters)
    with torch.device("meta"):
        skeleton = get_peft_model(type(base)(base.config), config)  # shapes only: no memory, no random numbers
    for path, module in skeleton.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        names = [name for name in weight_names(path, module) if name in factors]
        kind = wrapped_kind(module)
        A: Any = module.lora_A["default"]
        B: Any = module.lora_B["default"]
        if names and kind:
            padded = [factors[name].padded(ranks.get(name, rank)) for name in names]
            values = kind.pack([(weight.A, weight.B) for weight in padded])
        else:
            values = torch.zeros(A.weight.shape), torch.zeros(B.weight.shape)
        for slot, value in zip((A, B), values, strict=True):
            _fill(slot, value, dtype, path)
    saved = get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    # PEFT has changed the config: it names the skeleton, and it holds sets, whose order differs between runs.
    config.base_model_name_or_path = base_name(model)
    config.target_modules, config.target_parameters = projections, parameters
    return config, {key: value.detach() for key, value in saved.items()}


def _target_names(layers: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The names by which PEFT finds the layers, and those of their kind in other blocks, and no other module.

    A projection's name is enough where all modules of that name are its like, that is of the same path but for the
    numbers in it. Where others share it (the projections of an image tower), every layer is named by its whole path.
    """
    alike = {_without_numbers(layer) for layer in layers}
    names = set()
    for projection in {layer.rpartition(".")[2] for layer in layers}:
        found = [path for path in modules if path.rpartition(".")[2] == projection]
        of_ours = [path for path in found if _without_numbers(path) in alike]
        names |= {projection} if len(of_ours) == len(found) else set(of_ours)
    return sorted(names)


def _without_numbers(path: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def _plain_config(
    rank: int, ranks: Mapping[str, int], projections: list[str], parameters: list[str] | None
) -> LoraConfig:
    """The config of a plain LoRA adapter for inference; ``ranks`` holds the layers whose rank is another."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),  # so that every scaling is 1
        target_modules=projections,
        target_parameters=parameters,
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )


def _fill(slot: Any, value: Tensor, dtype: torch.dtype, name: str) -> None:
    if slot.weight.shape != value.shape:
        raise AdapterError(
            f"{name}: found a factor of shape {tuple(value.shape)}, expected {tuple(slot.weight.shape)}; check that "
            "the model's config is the one that the model was built from"
        )
    stored = value.detach().to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{name}: a factor is not finite in {dtype}; use dtype='bfloat16' or 'float32'")
    slot.weight = nn.Parameter(stored, requires_grad=False)


def _expert_parameters(model: Any) -> list[str]:
    """The expert parameters' names as the model's adapters spell them: PEFT stacks only adapters that spell them
    alike."""
    return sorted(next(config.target_parameters for config in model.peft_config.values() if config.target_parameters))


def add_adapter(model: nn.Module, config: LoraConfig, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Put an adapter on the model, frozen and switched off. Adapters that are on stay on.

    Args:
        model: a ``PeftModel``, or a transformers model with PEFT adapters.
        config: PEFT's config of the adapter.
        state_dict: PEFT's keys -> factors.
        adapter_name: the adapter's name on the model.

    Raises:
        AdapterError: the name is taken or holds a dot, or the state dict does not fit the model.
    """
    check_new_name(model, adapter_name)
    restore = snapshot(model)
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng():  # PEFT draws the initial A, which is then overwritten
            if isinstance(model, PeftModel):
                model.add_adapter(adapter_name, config)
            else:
                active = model.active_adapters()  # type: ignore[operator]
                model.add_adapter(config, adapter_name)  # type: ignore[operator]
                model.set_adapter(active)  # type: ignore[operator]
        give_memory(model, adapter_name)
        result = set_peft_model_state_dict(model, dict(state_dict), adapter_name=adapter_name)
        missing = [key for key in result.missing_keys if f".{adapter_name}." in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
    except BaseException as error:
        remove_adapter(model, adapter_name)
        restore()
        if not isinstance(error, (RuntimeError, ValueError)):  # PEFT's own, for shapes and for layers that do not exist
            raise
        raise AdapterError(
            f"the adapter does not fit this model: {' '.join(str(error).split())[:300]}; check that it was made for "
            "this architecture"
        ) from error
    finally:
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            parameter.requires_grad_(False)
