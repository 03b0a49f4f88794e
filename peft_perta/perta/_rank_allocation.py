"""Ranks over layers by what they gain: the same adapter size, spent where an edit needs it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch

from ..adapters import Factors, Product, factorize

LARGEST = 4  # no layer gets more than so many times the rank that all would have


def allocate(factors: Mapping[str, Factors], rank: int | float) -> dict[str, Factors]:
    """Factors cut to ranks that add up to no larger an adapter than ``rank`` (int) for every layer, or to the smallest
    that keeps that share (float) of all layers' energy together.

    Rank is handed out one by one, each to the layer where the next singular value's energy per element is largest.
    A layer is left with at least one.

    Args:
        factors: layer -> an edit, fitted at up to ``LARGEST`` times the rank.
    """
    spectra = {name: _energies(f) for name, f in factors.items()}
    sizes = {name: f.A.shape[1] + len(f.B) for name, f in factors.items()}
    ranks = dict.fromkeys(factors, 1)
    spent = sum(sizes.values())
    energy = sum(spectrum[0] for spectrum in spectra.values())
    total = sum(f.energy for f in factors.values())
    waiting = [(-s[1] / sizes[name], name) for name, s in spectra.items() if len(s) > 1]
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
    return {name: _cut(factors[name], found) for name, found in ranks.items()}


def _energies(factors: Factors) -> list[float]:
    """Squared singular values of what the factors hold, the largest first: those of an [R, R] core."""
    core = torch.linalg.qr(factors.B.double()).R @ torch.linalg.qr(factors.A.double().T).R.T
    return torch.linalg.svdvals(core).square().tolist()


def _cut(factors: Factors, rank: int) -> Factors:
    """The leading part, with the shares of the whole edit that it keeps and loses."""
    if rank >= factors.rank:
        return factors
    cut = factorize(Product(B=factors.B, A=factors.A), rank)
    kept = cut.energy_kept * factors.energy_kept
    return Factors(cut.A, cut.B, factors.energy, kept, factors.excess_error, 1 - kept)
