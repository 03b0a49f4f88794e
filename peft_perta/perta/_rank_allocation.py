"""Ranks: the rank of each layer's fit, and how one size budget is spread over the layers by marginal gain."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..adapters import SERVABLE_RANKS, Factors, Product, factorize, servable_rank

ALLOCATIONS = ("uniform", "padded", "pattern")
LARGEST = 4  # no layer gets more than this many times the uniform rank


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run.

    Attributes:
        fit: each layer is fitted at this rank (int), or at the smallest rank that keeps this share of its energy
            (float).
        budget: what ``allocate`` spreads over the layers, a rank (int) or a share of all energy (float); None if every
            layer keeps the rank of its fit.
        emitted: the adapter's rank; None if the factors decide it.
    """

    fit: int | float
    budget: int | float | None
    emitted: int | None


def ranks_of(rank: int | float | None, allocation: str, adapter_rank: int) -> Ranks:
    """The ranks of a run, from its settings.

    Args:
        rank: the config's rank; None for the forget adapter's own.
        allocation: one of ``ALLOCATIONS``.
        adapter_rank: the forget adapter's largest rank.

    Raises:
        ConfigError: no server takes so large a rank.
    """
    if isinstance(rank, float):
        # An allocation needs room: some layers keep more than the share, so that others may keep less.
        return Ranks(rank, None, None) if allocation == "uniform" else Ranks((1 + rank) / 2, rank, None)
    rank = rank or adapter_rank
    if allocation == "uniform":
        return Ranks(rank, None, servable_rank(rank))
    return Ranks(min(LARGEST * rank, SERVABLE_RANKS[-1]), rank, None)


def allocate(factors: Mapping[str, Factors], rank: int | float) -> dict[str, Factors]:
    """Spread ranks over the layers, and cut the factors to them.

    Ranks are handed out one at a time, each to the layer whose next singular value has the most energy per element.
    Every layer keeps at least rank 1.

    Args:
        factors: layer -> its edit, fitted at up to ``LARGEST`` times the rank.
        rank: an int for an adapter no larger than with this rank in every layer; a float for the smallest adapter that
            keeps this share of all layers' energy together.
    """
    spectra = {name: _energies(of_layer) for name, of_layer in factors.items()}
    sizes = {name: of_layer.A.shape[1] + len(of_layer.B) for name, of_layer in factors.items()}
    ranks = dict.fromkeys(factors, 1)
    spent = sum(sizes.values())
    energy = sum(spectrum[0] for spectrum in spectra.values())
    total = sum(of_layer.energy for of_layer in factors.values())
    waiting = [(-spectrum[1] / sizes[name], name) for name, spectrum in spectra.items() if len(spectrum) > 1]
    heapq.heapify(waiting)
    budget = rank * sum(sizes.values()) if isinstance(rank, int) else float("inf")
    while waiting and (isinstance(rank, int) or energy < rank * total):
        _, name = heapq.heappop(waiting)
        if spent + sizes[name] > budget:
            continue  # a narrower layer may still fit
        spent += sizes[name]
        energy += spectra[name][ranks[name]]
        ranks[name] += 1
        if ranks[name] < len(spectra[name]):
            heapq.heappush(waiting, (-spectra[name][ranks[name]] / sizes[name], name))
    return {name: _cut(factors[name], rank_of_layer) for name, rank_of_layer in ranks.items()}


def _energies(factors: Factors) -> list[float]:
    """The squared singular values of the factors' product, the largest first: those of an [R, R] core."""
    core = torch.linalg.qr(factors.B.double()).R @ torch.linalg.qr(factors.A.double().T).R.T
    return torch.linalg.svdvals(core).square().tolist()


def _cut(factors: Factors, rank: int) -> Factors:
    """The leading part, with the shares of the whole edit that it keeps and loses."""
    if rank >= factors.rank:
        return factors
    cut = factorize(Product(B=factors.B, A=factors.A), rank)
    energy_kept = cut.energy_kept * factors.energy_kept
    return Factors(cut.A, cut.B, factors.energy, energy_kept, factors.excess_error, 1 - energy_kept)
