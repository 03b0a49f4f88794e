"""Judging a model: metrics, logs, suites, attacks, and the search for a strength.

Imports from: errors, data, model.
"""

from .attacks import ATTACKS, run_attacks
from .attacks.attack import AttackResult, AttackSettings, Victims
from .attacks.table import format_attacks
from .calibration import TOLERANCE, Calibration, Goal, calibrate, forget_loss_of_log
from .completions import losses_of, row_losses, score_completions
from .generation import generate
from .lm_eval import general_benchmarks
from .logs.files import Log, format_rescored, read_log, summary, write_log
from .logs.rescoring import aggregate, rescore
from .metrics.memorization import exact_memorization
from .split_scores import SplitScores, evaluate_split
from .strength import Match, match_forgetting
from .subject import Subject
from .suites import RECORD_NAME, SUITES, evaluate, read_suites
from .suites.suite import Splits

__all__ = [
    "ATTACKS",
    "RECORD_NAME",
    "SUITES",
    "TOLERANCE",
    "AttackResult",
    "AttackSettings",
    "Calibration",
    "Goal",
    "Log",
    "Match",
    "SplitScores",
    "Splits",
    "Subject",
    "Victims",
    "aggregate",
    "calibrate",
    "evaluate",
    "evaluate_split",
    "exact_memorization",
    "forget_loss_of_log",
    "format_attacks",
    "format_rescored",
    "general_benchmarks",
    "generate",
    "losses_of",
    "match_forgetting",
    "read_log",
    "read_suites",
    "rescore",
    "row_losses",
    "run_attacks",
    "score_completions",
    "summary",
    "write_log",
]
