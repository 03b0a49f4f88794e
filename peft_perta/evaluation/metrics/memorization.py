"""Memorization: how much of an answer the model reproduces by itself."""

from __future__ import annotations

from torch import Tensor


def extraction_strength(hits: Tensor) -> float:
    """1 - k / t, in [1/t, 1]: k is the fewest first tokens of the answer after which greedy decoding gives the rest.

    Args:
        hits: [t] bool, whether the likeliest next token is the answer's, without the tokens that close the answer.

    Returns:
        The strength; 1/t where even the last token is missed, as in open-unlearning; 0 for an answer without tokens.

    Reference: Carlini et al. 2021, arXiv 2012.07805; as open-unlearning (arXiv 2506.12618) computes it.
    """
    if not len(hits):
        return 0.0
    misses = (~hits.bool()).nonzero()
    given = min(int(misses[-1]) + 1, len(hits) - 1) if len(misses) else 0
    return 1 - given / len(hits)


def exact_memorization(hits: Tensor) -> float | None:
    """The share of the answer's tokens that are the model's likeliest, in [0, 1]; None for an answer without tokens.

    Args:
        hits: [t] bool, as for ``extraction_strength``.

    Reference: Tirumala et al. 2022, arXiv 2205.10770; as open-unlearning (arXiv 2506.12618) computes it.
    """
    return float(hits.double().mean()) if len(hits) else None
