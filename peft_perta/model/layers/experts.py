"""Expert parameters of a mixture (``target_parameters``): one tensor [E, out, in] that a module's forward reads.

PEFT wraps the module once per parameter and holds the factors of all experts in two matrices: A [E * r, in], expert by
expert, and B [out, r * E], rank by rank. Each expert is a target of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from .kind import LayerKind


def _accepts(module: nn.Module) -> bool:
    return isinstance(module, ParamWrapper)


def _refusal(adapted: Any, base_layer: nn.Module) -> str | None:
    parameter = adapted.get_param()
    if not parameter.is_floating_point():
        return (
            f"has {adapted.parameter_name} in {parameter.dtype}, and the gradient of a packed parameter cannot be "
            "taken; load the experts in bfloat16 (llm_int8_skip_modules), or train the forget adapter without them"
        )
    return None


KIND = LayerKind("experts", _accepts, _refusal)


def expert_factors(wrapper: Any, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """PEFT's two matrices -> (A [R, I], B [O, R]) of each expert."""
    experts = wrapper.num_experts
    by_expert = A.reshape(experts, -1, A.shape[-1])
    by_rank = B.reshape(len(B), -1, experts)
    return [(by_expert[e].clone(), by_rank[:, :, e].clone()) for e in range(experts)]


def packed_factors(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(A [R, I], B [O, R]) of each expert -> PEFT's two matrices."""
    return torch.cat([A for A, _ in factors]), torch.stack([B for _, B in factors], dim=-1).flatten(1)


def is_stored_transposed(wrapper: Any) -> bool:
    """Whether the parameter is [E, in, out] (as GPT-OSS stores it) rather than [E, out, in]."""
    return wrapper.get_param().dim() == 3 and not wrapper._did_swap_in_out_features
