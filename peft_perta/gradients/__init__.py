"""The gradient engine: taps, modes, the plan, sums over samples, input moments, checkpoints.

Imports from: errors, data, model.
"""

from .blocks import find_blocks
from .checkpoint import Checkpoint, remove_checkpoint
from .engine import Limits, choose_plan, gather
from .gradient_sums import MOMENT, GradientSums, Outer, StatisticName
from .input_moments import Collector, Collectors, Energies, InputMoments
from .job import Job, check_losses, progress
from .modes.grouped import sweep
from .plan import Plan

__all__ = [
    "MOMENT",
    "Checkpoint",
    "Collector",
    "Collectors",
    "Energies",
    "GradientSums",
    "InputMoments",
    "Job",
    "Limits",
    "Outer",
    "Plan",
    "StatisticName",
    "check_losses",
    "choose_plan",
    "find_blocks",
    "gather",
    "progress",
    "remove_checkpoint",
    "sweep",
]
