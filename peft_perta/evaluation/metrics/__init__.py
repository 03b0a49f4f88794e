"""What a number means: one file a metric, pure functions of losses or texts, no model anywhere."""

from .choices import accuracy, chosen_option
from .forget_quality import forget_quality
from .membership import area_under_curve, minimum_k, minimum_k_plus_plus, privacy_leakage, reference_score, zlib_score
from .memorization import exact_memorization, extraction_strength
from .probability import probability
from .rouge import rouge_l_recall, rouge_scores
from .truth_ratio import forget_truth_score, retain_truth_score, truth_ratio, truth_ratio_of
from .utility import model_utility, normalised_probability

__all__ = [
    "accuracy",
    "area_under_curve",
    "chosen_option",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "forget_truth_score",
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
