"""Evaluation of a model with any stack of adapters: metrics, logs, suites, attacks and lm-eval.

It also searches the strength at which an adapter meets a goal, by forward passes only.

Imports from: errors, data, model, gradients.
"""

from .attacks import ATTACKS, check_attacks, run_attacks
from .attacks.attack import Answer, Attack, AttackResult, AttackSettings, Victims
from .attacks.depth import fall_after, patched_falls
from .attacks.formatting import attack_cells, format_attacks, skipped_attacks
from .attacks.relearning import fresh_adapter, with_factors
from .audit import (
    AUDIT_RECORD_NAME,
    FORGOTTEN,
    RULE,
    STILL_THERE,
    SUPPRESSED,
    TRACE,
    Audit,
    AuditResult,
    Evidence,
    Verdict,
    audit,
    decide,
    evidence_of,
    read_audit,
)
from .calibration import TOLERANCE, Calibration, Goal, calibrate, forget_loss_of_log
from .completions import ScoredCompletion, losses_of, score_completions, score_false_answers
from .generation import generate, stream
from .lm_eval import check_lm_eval, general_benchmarks
from .logs.files import Log, format_rescored, read_log, summary, write_log
from .logs.rescoring import aggregate, rescore, row_texts
from .metrics.bootstrap import Interval, drawn_means, interval
from .metrics.depth import depth_score
from .metrics.memorization import exact_memorization
from .metrics.metric import METRIC_GROUPS, Metric
from .metrics.table import METRICS, metric_of
from .metrics.utility import normalised_probability
from .own_rows import own_rows
from .split_scores import SplitScores, evaluate_split
from .strength import Match, check_start, match_forgetting
from .subject import Subject
from .suites import RECORD_NAME, SUITES, Splits, Suite, evaluate, forget_rows, read_suites

__all__ = [
    "ATTACKS",
    "AUDIT_RECORD_NAME",
    "FORGOTTEN",
    "METRICS",
    "METRIC_GROUPS",
    "RECORD_NAME",
    "RULE",
    "STILL_THERE",
    "SUITES",
    "SUPPRESSED",
    "TOLERANCE",
    "TRACE",
    "Answer",
    "Attack",
    "AttackResult",
    "AttackSettings",
    "Audit",
    "AuditResult",
    "Calibration",
    "Evidence",
    "Goal",
    "Interval",
    "Log",
    "Match",
    "Metric",
    "ScoredCompletion",
    "SplitScores",
    "Splits",
    "Subject",
    "Suite",
    "Verdict",
    "Victims",
    "aggregate",
    "attack_cells",
    "audit",
    "calibrate",
    "check_attacks",
    "check_lm_eval",
    "check_start",
    "decide",
    "depth_score",
    "drawn_means",
    "evaluate",
    "evaluate_split",
    "evidence_of",
    "exact_memorization",
    "fall_after",
    "forget_loss_of_log",
    "forget_rows",
    "format_attacks",
    "format_rescored",
    "fresh_adapter",
    "general_benchmarks",
    "generate",
    "interval",
    "losses_of",
    "match_forgetting",
    "metric_of",
    "normalised_probability",
    "own_rows",
    "patched_falls",
    "read_audit",
    "read_log",
    "read_suites",
    "rescore",
    "row_texts",
    "run_attacks",
    "score_completions",
    "score_false_answers",
    "skipped_attacks",
    "stream",
    "summary",
    "with_factors",
    "write_log",
]
