"""Model and adapter -> the weights to edit. Every adapter that cannot be edited is refused here, before any compute."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..data import note
from ..errors import AdapterError, NumericalError, UnsupportedLayerError
from .distributed import whole
from .identity import check_base
from .layers import LAYER_KINDS, wrapped_kind
from .layers.kind import LayerKind
from .plain_lora import check_lora_config
from .stack import base_model, check_decoder, require_adapter

_Owners = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Target:
    """One weight that carries the adapter: the weight of a layer, or of one expert.

    Attributes:
        module_path: path of the module inside the base model, such as ``model.layers.0.self_attn.q_proj`` or
            ``model.layers.0.mlp.experts``.
        adapted: PEFT's wrapper.
        base_layer: the module that it wraps. Gradients are taken at its output; for an expert, at its parameter.
        kind: what the package knows about the layer.
        A: [R, I], in float32 or wider; a copy of the adapter's factor.
        B: [O, R], likewise. The task vector is ``scaling * B @ A``.
        scaling: the adapter's scaling on the model, when the target was resolved.
        parameter: for an expert, the name of the parameter [E, O, I] in the module; None for a layer.
        expert: for an expert, its index in the parameter; None for a layer.
        transposed: the weight is stored as [I, O] (an expert's as [E, I, O]).
    """

    module_path: str
    adapted: LoraLayer
    base_layer: nn.Module
    kind: LayerKind
    A: Tensor
    B: Tensor
    scaling: float
    parameter: str | None = None
    expert: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """The weight's name in messages and in provenance: the layer's path, or ``...experts.down_proj[3]``."""
        return _weight_name(self.module_path, self.parameter, self.expert)

    @property
    def weight_path(self) -> str:
        """The path of the parameter that holds the weight; the experts of a parameter share it."""
        return f"{self.module_path}.{self.parameter or 'weight'}"

    @property
    def rank(self) -> int:
        """R."""
        return self.A.shape[0]


def resolve_targets(model: nn.Module, adapter_name: str) -> list[Target]:
    """The weights that carry a trained adapter, in the order of the model's modules.

    Raises:
        ConfigError: the model is an encoder-decoder.
        AdapterError: the adapter is missing, cannot be negated, is merged or untrained, or belongs to another base.
        UnsupportedLayerError: the adapter sits on a layer that cannot be read or edited.
        NumericalError: a factor is not finite.
    """
    config = require_adapter(model, adapter_name)
    check_decoder(model)
    check_lora_config(config, adapter_name)
    check_base(model, adapter_name)
    targets = resolve_layers(model, adapter_name)
    for target in targets:
        finite = bool(torch.isfinite(target.A).all()) and bool(torch.isfinite(target.B).all())
        if not (finite and math.isfinite(target.scaling)):
            raise NumericalError(
                f"{target.name}: the forget adapter holds NaN or infinite values; train it again with a lower "
                "learning rate"
            )
    if not any(bool(target.B.any()) for target in targets):
        raise AdapterError(
            f"adapter {adapter_name!r} is untrained: every B is zero, so it holds nothing to forget; train it first"
        )
    return targets


def resolve_layers(model: nn.Module, adapter_name: str) -> list[Target]:
    """The weights that carry the adapter, trained or not, in the order of the model's modules.

    Raises:
        AdapterError: it adapts no layer, or is merged.
        UnsupportedLayerError: it sits on a layer that cannot be read or edited.
    """
    base = base_model(model)
    owners = _owners(base)
    targets = [
        target
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module._get_available_adapters()
        for target in _resolve(path, module, adapter_name, owners)
    ]
    if not targets:
        raise AdapterError(f"adapter {adapter_name!r} adapts no layer of the model; check its target_modules")
    return targets


def changed_targets(targets: list[Target]) -> list[Target]:
    """The targets in parameters that the adapter changes; what is left out is said once.

    The others have B = 0: the rows that it was trained on never reach them (an image tower, a weight that is read past
    its module), so they have no gradient, and there is nothing to take out of them.

    Args:
        targets: of one adapter.
    """
    changed = {target.weight_path for target in targets if bool(target.B.any())}
    unchanged = list(dict.fromkeys(target.weight_path for target in targets if target.weight_path not in changed))
    if unchanged:
        some = ", ".join(unchanged[:3]) + (", ..." if len(unchanged) > 3 else "")
        note(f"{len(unchanged)} weights are left as they are: the adapter does not change them ({some})")
    return [target for target in targets if target.weight_path in changed]


def weight_names(path: str, wrapper: LoraLayer) -> list[str]:
    """The names of the targets under a LoRA wrapper at this path of the base model."""
    kind = wrapped_kind(wrapper)
    parameter = kind.expert_parameter(wrapper) if kind else None
    if parameter is None:
        return [path]
    module_path = _unnested(path)
    return [_weight_name(module_path, parameter.name, expert) for expert in range(parameter.experts)]


def hash_targets(targets: list[Target]) -> str:
    """SHA-256 of the adapter's factors and scalings: it identifies the forget adapter that an edit was made from."""
    digest = hashlib.sha256()
    for target in targets:
        digest.update(f"{target.name} {target.scaling!r} {tuple(target.A.shape)} {tuple(target.B.shape)}".encode())
        for factor in (target.A, target.B):
            digest.update(factor.to("cpu", torch.float64).contiguous().numpy().astype("<f8").tobytes())
    return digest.hexdigest()


def _resolve(path: str, adapted: Any, adapter_name: str, owners: Mapping[int, _Owners]) -> list[Target]:
    if adapted.merged:
        raise AdapterError(
            f"{path}: the adapters {adapted.merged_adapters} are merged into the weights; call unmerge_adapter() first"
        )
    if adapter_name in getattr(adapted, "lora_variant", {}):
        variant = type(adapted.lora_variant[adapter_name]).__name__
        raise AdapterError(f"{path}: adapter {adapter_name!r} is the LoRA variant {variant}, expected plain LoRA")
    base_layer = adapted.get_base_layer()
    kind = wrapped_kind(adapted)
    if kind is None or adapter_name not in adapted.lora_A:
        accepted = ", ".join(kind.name for kind in LAYER_KINDS)
        raise UnsupportedLayerError(
            f"{path}: a {type(base_layer).__name__} layer cannot be edited, expected one of: {accepted}; "
            "train the forget adapter without it (exclude_modules; --exclude-modules)"
        )
    reason = kind.refusal(adapted, base_layer)
    if reason is not None:
        raise UnsupportedLayerError(f"{path} {reason}")
    scaling = float(adapted.scaling[adapter_name])
    A, B = (_copied(factors[adapter_name]) for factors in (adapted.lora_A, adapted.lora_B))
    parameter = kind.expert_parameter(adapted)
    _check_untied(path, base_layer, parameter.name if parameter else "weight", owners)
    transposed = kind.is_transposed(adapted)
    factors = kind.split(adapted, A, B)
    if parameter is None:
        ((A, B),) = factors
        return [Target(path, adapted, base_layer, kind, A, B, scaling, transposed=transposed)]
    module_path = _unnested(path)
    return [
        Target(module_path, adapted, base_layer, kind, A, B, scaling, parameter.name, expert, transposed)
        for expert, (A, B) in enumerate(factors)
    ]


def _weight_name(module_path: str, parameter: str | None, expert: int | None) -> str:
    return module_path if expert is None else f"{module_path}.{parameter}[{expert}]"


def _unnested(path: str) -> str:
    """The path of a module that PEFT wraps once per parameter, each wrapper inside the next."""
    return path.replace(".base_layer", "")


def _copied(factor: nn.Module) -> Tensor:
    with align_module_device(factor):  # an offloaded module holds its weight only while it computes
        weight: Any = factor.weight
        return whole(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _owners(base: nn.Module) -> dict[int, _Owners]:
    """id of a parameter -> the modules that hold it, by their paths."""
    owners: dict[int, _Owners] = {}
    for path, module in base.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((path, module))
    return owners


def _check_untied(path: str, base_layer: nn.Module, parameter: str, owners: Mapping[int, _Owners]) -> None:
    for other_path, other in owners.get(id(getattr(base_layer, parameter)), ()):
        if other is not base_layer:
            raise UnsupportedLayerError(
                f"{path} shares its weight with {other_path}: editing one would edit both; train the forget adapter "
                "without it (exclude_modules; --exclude-modules)"
            )
