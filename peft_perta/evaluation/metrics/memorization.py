"""How much of an answer the model would say by itself."""

from __future__ import annotations

from torch import Tensor


def extraction_strength(hits: Tensor) -> float:
    """1 - k / t, in [1/t, 1]: with the fewest k of the answer's t tokens given, the greedy rest is right.

    Args:
        hits: [t] bool, whether the likeliest next token is the answer's own, without the token that closes the answer.

    Returns:
        1/t where even the last token is missed, as open-unlearning has it; 0 for an answer without tokens.

    Reference: Carlini et al. 2021, arXiv 2012.07805; as open-unlearning (arXiv 2506.12618) computes it.
    """
    if not len(hits):
        return 0.0
    misses = (~hits.bool()).nonzero()
    given = min(int(misses[-1]) + 1, len(hits) - 1) if len(misses) else 0
    return 1 - given / len(hits)


def exact_memorization(hits: Tensor) -> float | None:
    """The share of the answer's tokens, ``hits`` [t] as above, that are the likeliest: in [0, 1]; None where t = 0.

    Reference: Tirumala et al. 2022, arXiv 2205.10770; as open-unlearning (arXiv 2506.12618) computes it.
    """
    return float(hits.double().mean()) if len(hits) else None
