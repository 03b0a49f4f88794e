"""Several adapters as one, for servers that take one a request. Concatenation is exact; a smaller rank is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import AdapterError, ConfigError, NumericalError
from ..model import Target, base_name, check_base, check_lora_config, hash_targets, require_adapter, resolve_layers
from .build import build_adapter
from .emitted import EmittedAdapter
from .low_rank import Factors, Product, factorize
from .provenance import FusedProvenance
from .servable import SERVABLE_RANKS, servable_rank


def fuse_adapters(
    model: nn.Module,
    strengths: Mapping[str, float] | Sequence[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> EmittedAdapter:
    """sum_k strength_k s_k B_k A_k as one plain LoRA adapter: [B_1 .. B_n] @ [A_1; ..; A_n].

    Args:
        model: carries the adapters; its own weights are not needed (``loading.load_skeleton`` will do).
        strengths: adapter name -> factor on its delta, or names alone for 1 each.
        rank: truncate to it (least Frobenius error, in the report); by default the ranks' sum, exactly.

    Raises:
        AdapterError: fewer than two adapters, or one that is not plain LoRA or of another base.
        ConfigError: the ranks' sum is more than a server takes, and no rank is given.
        NumericalError: a factor is not finite.
    """
    factors_of = dict(strengths) if isinstance(strengths, Mapping) else dict.fromkeys(strengths, 1.0)
    if len(factors_of) < 2:
        raise AdapterError(f"expected at least two adapters to fuse, found {sorted(factors_of)}")
    return combine_adapters(model, factors_of, rank=rank, dtype=dtype)


def check_ranks(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that no server would take as one.

    Raises:
        ConfigError: their ranks, without zeros, add up to more.
    """
    used: dict[str, int] = {}
    for name in names:
        for target in resolve_layers(model, name):
            used[target.name] = used.get(target.name, 0) + int((target.A.any(1) & target.B.any(0)).sum())
    _check_whole(max(used.values()))


def _check_whole(rank: int) -> None:
    if rank > SERVABLE_RANKS[-1]:
        raise ConfigError(
            f"the adapters' ranks add up to {rank}, expected at most {SERVABLE_RANKS[-1]}; give a rank to truncate to"
        )


def combine_adapters(
    model: nn.Module, factors_of: Mapping[str, float], *, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> EmittedAdapter:
    """The same of one adapter or more; at their own rank one comes back scaled."""
    if rank is not None and not 1 <= rank <= SERVABLE_RANKS[-1]:
        raise ConfigError(f"rank: expected an int from 1 to {SERVABLE_RANKS[-1]}, found {rank!r}")
    parts: dict[str, list[tuple[Target, float]]] = {}
    hashes = {}
    for name, factor in factors_of.items():
        check_lora_config(require_adapter(model, name), name)
        check_base(model, name)
        targets = resolve_layers(model, name)
        hashes[name] = hash_targets(targets)
        for target in targets:
            parts.setdefault(target.name, []).append((target, factor))
    products = {name: _concatenated(found) for name, found in parts.items()}
    whole = max(max(product.A.shape[0] for product in products.values()), 1)
    if rank is None:
        _check_whole(whole)
    fused: dict[str, Factors] = {}
    for name, product in products.items():
        fused[name] = factorize(product, rank or whole)
        if not (bool(torch.isfinite(fused[name].A).all()) and bool(torch.isfinite(fused[name].B).all())):
            raise NumericalError(f"{name}: the fused factors are not finite; look at the adapters and their strengths")
    emitted = servable_rank(rank or whole)
    lora_config, state_dict = build_adapter(model, fused, emitted, dtype)
    energy = sum(f.energy for f in fused.values())
    provenance = FusedProvenance(
        base_model={"name": base_name(model)},
        parts=[{"name": n, "strength": float(factor), "sha256": hashes[n]} for n, factor in factors_of.items()],
        rank=emitted,
        energy_kept=sum(f.energy * f.energy_kept for f in fused.values()) / energy if energy else 1.0,
        dtype=str(dtype).removeprefix("torch."),
    )
    return EmittedAdapter(lora_config, state_dict, provenance)


def _concatenated(found: list[tuple[Target, float]]) -> Product:
    """[B_1 .. B_n] @ [A_1; ..; A_n] without what adapters were zero-padded with."""
    B = torch.cat([factor * target.scaling * target.B for target, factor in found], dim=1)
    A = torch.cat([target.A for target, _ in found])
    used = A.any(1) & B.any(0)
    return Product(B=B[:, used], A=A[used])
