"""What a number means: one file a metric, pure functions of losses or texts, no model anywhere."""

from .probability import probability
from .rouge import rouge_l_recall
from .truth_ratio import forget_truth_score, retain_truth_score, truth_ratio

__all__ = ["forget_truth_score", "probability", "retain_truth_score", "rouge_l_recall", "truth_ratio"]
