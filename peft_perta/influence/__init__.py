"""LLMEraser: rows taken out of an adapter without training it again.

Imports from: ...
"""

from .erase import check_difference, correct_responses, erase_instances, modify_queries
from .settings import CURVATURES, FACTORS, SOLVERS, InfluenceSettings

__all__ = [
    "CURVATURES",
    "FACTORS",
    "SOLVERS",
    "InfluenceSettings",
    "check_difference",
    "correct_responses",
    "erase_instances",
    "modify_queries",
]
