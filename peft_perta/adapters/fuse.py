"""Fuse several adapters into one, for servers that take one adapter per request.

Concatenating the factors is exact; truncating the sum to a smaller rank is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import AdapterError, ConfigError, NumericalError
from ..model import Target, check_base, check_lora_config, hash_targets, require_adapter, resolve_layers
from .build import build_adapter
from .emitted import EmittedAdapter
from .low_rank import Factors, Product, factorize
from .provenance import FusedProvenance, describe_base
from .servable import SERVABLE_RANKS, check_servable, dtype_name, servable_rank


def fuse_adapters(
    model: nn.Module,
    strengths: Mapping[str, float] | Sequence[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    labels: Mapping[str, str] | None = None,
) -> EmittedAdapter:
    """sum_k strength_k s_k B_k A_k as one plain LoRA adapter: [B_1 .. B_n] @ [A_1; ..; A_n].

    Args:
        model: carries the adapters; its own weights are not needed (``load_skeleton`` gives such a model).
        strengths: adapter name -> factor on its delta; or a list of names, for a factor of 1 each.
        rank: truncate the sum to this rank, at the least Frobenius error, which the provenance holds. By default the
            rank is the sum of the ranks, and the result is exact.
        dtype: of the emitted factors.
        labels: adapter name -> what messages and the provenance call it, such as its directory; by default, its name.

    Returns:
        The fused adapter.

    Raises:
        AdapterError: there are fewer than two adapters, or one is not plain LoRA or has another base.
        ConfigError: the sum of the ranks is above what servers accept and no rank is given, or the rank is out of
            range.
        NumericalError: a factor is not finite.
    """
    strength_of = dict(strengths) if isinstance(strengths, Mapping) else dict.fromkeys(strengths, 1.0)
    if len(strength_of) < 2:
        raise AdapterError(f"expected at least two adapters to fuse, found {sorted(strength_of)}")
    return combine_adapters(model, strength_of, rank=rank, dtype=dtype, labels=labels)


def check_ranks(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters whose sum would have too large a rank for any server.

    Raises:
        ConfigError: their ranks, without zero padding, add up to too much.
    """
    ranks: dict[str, int] = {}
    for name in names:
        for target in resolve_layers(model, name):
            ranks[target.name] = ranks.get(target.name, 0) + int((target.A.any(1) & target.B.any(0)).sum())
    _check_sum(max(ranks.values()))


def _check_sum(rank: int) -> None:
    check_servable(rank, "the adapters' ranks add up to", "give a rank to truncate to")


def combine_adapters(
    model: nn.Module,
    strengths: Mapping[str, float],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    labels: Mapping[str, str] | None = None,
) -> EmittedAdapter:
    """``fuse_adapters`` for one adapter or more; one adapter alone is scaled and keeps its rank."""
    labels = {name: name for name in strengths} | dict(labels or {})
    if rank is not None and not 1 <= rank <= SERVABLE_RANKS[-1]:
        raise ConfigError(f"rank: expected an int from 1 to {SERVABLE_RANKS[-1]}, found {rank!r}")
    parts: dict[str, list[tuple[Target, float]]] = {}
    hashes = {}
    for name, strength in strengths.items():
        check_lora_config(require_adapter(model, name), labels[name])
        check_base(model, name, labels[name])
        targets = resolve_layers(model, name)
        hashes[name] = hash_targets(targets)
        for target in targets:
            parts.setdefault(target.name, []).append((target, strength))
    products = {name: _concatenated(layer_parts) for name, layer_parts in parts.items()}
    exact_rank = max(max(product.A.shape[0] for product in products.values()), 1)
    if rank is None:
        _check_sum(exact_rank)
    fused = {name: _finite_factors(name, product, rank or exact_rank) for name, product in products.items()}
    emitted_rank = servable_rank(rank or exact_rank)
    lora_config, state_dict = build_adapter(model, fused, emitted_rank, dtype)
    energy = sum(factors.energy for factors in fused.values())
    energy_kept = sum(factors.energy * factors.energy_kept for factors in fused.values())
    provenance = FusedProvenance(
        base_model=describe_base(model),
        parts=[
            {"name": labels[name], "strength": float(strength), "sha256": hashes[name]}
            for name, strength in strengths.items()
        ],
        rank=emitted_rank,
        energy_kept=energy_kept / energy if energy else 1.0,
        dtype=dtype_name(dtype),
    )
    return EmittedAdapter(lora_config, state_dict, provenance)


def _concatenated(parts: list[tuple[Target, float]]) -> Product:
    """[B_1 .. B_n] @ [A_1; ..; A_n], without the adapters' zero padding."""
    B = torch.cat([strength * target.scaling * target.B for target, strength in parts], dim=1)
    A = torch.cat([target.A for target, _ in parts])
    used = A.any(1) & B.any(0)
    return Product(B=B[:, used], A=A[used])


def _finite_factors(name: str, product: Product, rank: int) -> Factors:
    factors = factorize(product, rank)
    if not (bool(torch.isfinite(factors.A).all()) and bool(torch.isfinite(factors.B).all())):
        raise NumericalError(f"{name}: the fused factors are not finite; check the adapters and their strengths")
    return factors
