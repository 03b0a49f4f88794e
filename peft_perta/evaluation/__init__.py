"""Evaluation of a model with any stack of adapters: metrics, logs, suites, attacks and lm-eval.

It also searches the strength at which an adapter meets a goal, by forward passes only.

Imports from: errors, data, model, gradients.
"""

from .attacks import ATTACKS, check_attacks, run_attacks
from .attacks.as_asked import AS_ASKED
from .attacks.attack import Answer, Attack, AttackResult, AttackSettings, Victims
from .attacks.depth import fall_after, patched_falls
from .attacks.formatting import format_attacks
from .calibration import TOLERANCE, Calibration, Goal, calibrate, forget_loss_of_log
from .completions import ScoredCompletion, losses_of, score_completions, score_false_answers
from .generation import generate
from .lm_eval import check_lm_eval, general_benchmarks
from .logs.files import Log, format_rescored, read_log, summary, write_log
from .logs.rescoring import aggregate, rescore, row_texts
from .metrics.depth import depth_score
from .metrics.memorization import exact_memorization
from .metrics.metric import METRIC_GROUPS, Metric
from .metrics.table import METRICS, metric_of
from .metrics.utility import normalised_probability
from .split_scores import SplitScores, evaluate_split
from .strength import Match, check_start, match_forgetting
from .subject import Subject
from .suites import RECORD_NAME, SUITES, Splits, Suite, evaluate, forget_rows, hash_stack, read_suites

__all__ = [
    "AS_ASKED",
    "ATTACKS",
    "METRICS",
    "METRIC_GROUPS",
    "RECORD_NAME",
    "SUITES",
    "TOLERANCE",
    "Answer",
    "Attack",
    "AttackResult",
    "AttackSettings",
    "Calibration",
    "Goal",
    "Log",
    "Match",
    "Metric",
    "ScoredCompletion",
    "SplitScores",
    "Splits",
    "Subject",
    "Suite",
    "Victims",
    "aggregate",
    "calibrate",
    "check_attacks",
    "check_lm_eval",
    "check_start",
    "depth_score",
    "evaluate",
    "evaluate_split",
    "exact_memorization",
    "fall_after",
    "forget_loss_of_log",
    "forget_rows",
    "format_attacks",
    "format_rescored",
    "general_benchmarks",
    "generate",
    "hash_stack",
    "losses_of",
    "match_forgetting",
    "metric_of",
    "normalised_probability",
    "patched_falls",
    "read_log",
    "read_suites",
    "rescore",
    "row_texts",
    "run_attacks",
    "score_completions",
    "score_false_answers",
    "summary",
    "write_log",
]
