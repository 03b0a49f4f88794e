"""Adapter and model -> the list of layers to edit. Every refusal of an adapter happens here, before any compute."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import AdapterError, NumericalError, UnsupportedLayerError
from .identity import check_base
from .layers import LAYER_KINDS, find_kind
from .layers.experts import expert_factors, is_stored_transposed
from .layers.kind import LayerKind
from .plain_lora import check_lora_config
from .stack import base_model, require_adapter


@dataclass(frozen=True)
class Target:
    """One weight that carries the forget adapter: of a layer, or of one expert.

    Attributes:
        name: path inside the base model, e.g. ``model.layers.0.self_attn.q_proj`` or
            ``model.layers.0.mlp.experts.down_proj[3]``.
        adapted: PEFT's wrapper.
        base_layer: the layer that it wraps, whose output is tapped; for an expert, the module that holds the parameter.
        A: [R, I], float32 or wider; B: [O, R], the same. Copies of the adapter's factors.
        scaling: the live scaling s; the task vector is s * B @ A.
        parameter: for an expert, the name of the parameter [E, O, I]; None for a layer.
        expert: for an expert, its index in the parameter.
        transposed: the parameter is stored as [E, I, O].
    """

    name: str
    adapted: LoraLayer
    base_layer: nn.Module
    kind: LayerKind
    A: Tensor
    B: Tensor
    scaling: float
    parameter: str | None = None
    expert: int = 0
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def resolve_targets(model: nn.Module, adapter_name: str) -> list[Target]:
    """The layers that carry the adapter, in the model's order.

    Raises:
        AdapterError: the adapter is missing, of a kind that cannot be negated, merged, untrained, or of another base.
        UnsupportedLayerError: it sits on a layer that we cannot read or edit.
        NumericalError: a factor is not finite.
    """
    check_lora_config(require_adapter(model, adapter_name), adapter_name)
    check_base(model, adapter_name)
    targets = resolve_layers(model, adapter_name)
    for target in targets:
        finite = bool(torch.isfinite(target.A).all()) and bool(torch.isfinite(target.B).all())
        if not (finite and math.isfinite(target.scaling)):
            raise NumericalError(
                f"{target.name}: the forget adapter holds NaN or infinite values; train it anew, at a lower "
                "learning rate"
            )
    if not any(bool(target.B.any()) for target in targets):
        raise AdapterError(
            f"adapter {adapter_name!r} is untrained: every B is zero, so it holds nothing to forget; train it first"
        )
    return targets


def resolve_layers(model: nn.Module, adapter_name: str) -> list[Target]:
    """The layers that carry the adapter, whatever it has learned so far.

    Raises:
        AdapterError: it adapts no layer, or is merged.
        UnsupportedLayerError: it sits on a layer that we cannot read or edit.
    """
    base = base_model(model)
    targets = [
        target
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module._get_available_adapters()
        for target in _resolve(name, module, adapter_name, base)
    ]
    if not targets:
        raise AdapterError(f"adapter {adapter_name!r} adapts no layer of the model; check its target_modules")
    return targets


def hash_targets(targets: list[Target]) -> str:
    """SHA-256 of the adapter's factors and scalings: which forget adapter an edit was made from."""
    digest = hashlib.sha256()
    for target in targets:
        digest.update(f"{target.name} {target.scaling!r} {tuple(target.A.shape)} {tuple(target.B.shape)}".encode())
        for factor in (target.A, target.B):
            digest.update(factor.to("cpu", torch.float64).contiguous().numpy().astype("<f8").tobytes())
    return digest.hexdigest()


def _resolve(name: str, adapted: Any, adapter_name: str, base: nn.Module) -> list[Target]:
    if adapted.merged:
        raise AdapterError(
            f"{name}: the adapters {adapted.merged_adapters} are merged into the weights; call unmerge_adapter() first"
        )
    if adapter_name in getattr(adapted, "lora_variant", {}):
        variant = type(adapted.lora_variant[adapter_name]).__name__
        raise AdapterError(f"{name}: adapter {adapter_name!r} is the LoRA variant {variant}, expected plain LoRA")
    base_layer = adapted.get_base_layer()
    kind = find_kind(adapted) or find_kind(base_layer)
    if kind is None or adapter_name not in adapted.lora_A:
        accepted = ", ".join(kind.name for kind in LAYER_KINDS)
        raise UnsupportedLayerError(
            f"{name}: a {type(base_layer).__name__} layer cannot be edited, expected one of: {accepted}; "
            "train the forget adapter without it (target_modules)"
        )
    reason = kind.refusal(adapted, base_layer)
    if reason is not None:
        raise UnsupportedLayerError(f"{name} {reason}")
    scaling = float(adapted.scaling[adapter_name])
    A, B = (_copied(factors[adapter_name]) for factors in (adapted.lora_A, adapted.lora_B))
    _refuse_tied(name, base_layer, adapted.parameter_name if kind.name == "experts" else "weight", base)
    if kind.name != "experts":
        return [Target(name, adapted, base_layer, kind, A, B, scaling)]
    path = f"{name.replace('.base_layer', '')}.{adapted.parameter_name}"  # wrappers of several parameters are nested
    transposed = is_stored_transposed(adapted)
    return [
        Target(f"{path}[{e}]", adapted, base_layer, kind, *factors, scaling, adapted.parameter_name, e, transposed)
        for e, factors in enumerate(expert_factors(adapted, A, B))
    ]


def _copied(factor: nn.Module) -> Tensor:
    with align_module_device(factor):  # an offloaded module has its weight only while it computes
        weight: Any = factor.weight
        return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _refuse_tied(name: str, base_layer: nn.Module, parameter: str, base: nn.Module) -> None:
    weight = getattr(base_layer, parameter)
    for other_name, other in base.named_modules():
        if other is not base_layer and any(held is weight for held in other._parameters.values()):
            raise UnsupportedLayerError(
                f"{name} shares its weight with {other_name}: an edit of one would be an edit of both; train the "
                "forget adapter without it (target_modules)"
            )
