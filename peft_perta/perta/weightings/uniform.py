"""Weights of 1 everywhere: plain task arithmetic, without gradients.

Reference: Ilharco et al. 2023, arXiv 2212.04089.
"""

from .weighting import Weighting

UNIFORM = Weighting("uniform", None, None, description="weights of 1, which is plain task arithmetic without gradients")
