"""Metrics, one file each: pure functions of losses, token scores or texts, and the table ``METRICS`` that names them.

To add a metric: a file with its functions, a row in table.py, a row in tests/tables.py.
"""

from .choices import accuracy, chosen_option
from .depth import depth_score
from .forget_quality import forget_quality
from .membership import area_under_curve, minimum_k, minimum_k_plus_plus, privacy_leakage, reference_score, zlib_score
from .memorization import exact_memorization, extraction_strength
from .metric import METRIC_GROUPS, Metric
from .probability import probability
from .rouge import rouge_l_recall, rouge_scores
from .table import METRICS, metric_of
from .truth_ratio import forget_truth_score, retain_truth_score, truth_ratio, truth_ratio_of
from .utility import model_utility, normalised_probability

__all__ = [
    "METRICS",
    "METRIC_GROUPS",
    "Metric",
    "accuracy",
    "area_under_curve",
    "chosen_option",
    "depth_score",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "forget_truth_score",
    "metric_of",
    "minimum_k",
    "minimum_k_plus_plus",
    "model_utility",
    "normalised_probability",
    "privacy_leakage",
    "probability",
    "reference_score",
    "retain_truth_score",
    "rouge_l_recall",
    "rouge_scores",
    "truth_ratio",
    "truth_ratio_of",
    "zlib_score",
]
