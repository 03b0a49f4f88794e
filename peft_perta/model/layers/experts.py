"""Expert parameters of a mixture (``target_parameters``): one tensor [E, O, I] that a module's forward reads.

PEFT wraps the module once per parameter and packs the factors of all experts into two matrices: A [E * R, I], grouped
by expert, and B [O, R * E], grouped by rank. Each expert is a target of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from .kind import ExpertParameter, LayerKind


def _accepts(module: nn.Module) -> bool:
    return isinstance(module, ParamWrapper)


def _refusal(wrapper: Any, base_layer: nn.Module) -> str | None:
    parameter = wrapper.get_param()
    if not parameter.is_floating_point():
        return (
            f"has {wrapper.parameter_name} in {parameter.dtype}, expected a floating-point type: a packed parameter "
            "has no gradient; load the experts in bfloat16 (llm_int8_skip_modules), or train the forget adapter "
            "without them"
        )
    return None


def _is_transposed(wrapper: Any) -> bool:
    """GPT-OSS stores its experts as [E, I, O]."""
    return wrapper.get_param().dim() == 3 and not wrapper._did_swap_in_out_features


def _expert_parameter(wrapper: Any) -> ExpertParameter:
    return ExpertParameter(wrapper.parameter_name, wrapper.num_experts)


def _split(wrapper: Any, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    experts = wrapper.num_experts
    by_expert = A.reshape(experts, -1, A.shape[-1])
    by_rank = B.reshape(len(B), -1, experts)
    return [(by_expert[e].clone(), by_rank[:, :, e].clone()) for e in range(experts)]


def _pack(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([A for A, _ in factors]), torch.stack([B for _, B in factors], dim=-1).flatten(1)


KIND = LayerKind(
    "experts",
    _accepts,
    _refusal,
    is_transposed=_is_transposed,
    expert_parameter=_expert_parameter,
    split=_split,
    pack=_pack,
)
