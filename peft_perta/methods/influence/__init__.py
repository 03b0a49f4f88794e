"""LLMEraser: rows taken out of an adapter, or changed in it, by its own curvature; the adapter is not trained again.

Reference: Ding et al. 2024, arXiv 2412.00383.
"""

from .erase import InfluenceResult, check_difference, correct_responses, erase_instances, modify_queries
from .settings import CURVATURES, FACTORS, SOLVERS, InfluenceSettings

__all__ = [
    "CURVATURES",
    "FACTORS",
    "SOLVERS",
    "InfluenceResult",
    "InfluenceSettings",
    "check_difference",
    "correct_responses",
    "erase_instances",
    "modify_queries",
]
