"""The gradient engine: a description of what to sum goes in, and the sums of each layer over each data set come out.
It plans within a memory budget, taps the layers, runs backward, and resumes interrupted runs from checkpoints.

Imports from: errors, data, model.
"""

from .blocks import at_each_block, find_blocks, hidden_states
from .checkpoint import Checkpoint, remove_checkpoint
from .collector import Collector, GradientSource, MomentSource, Shape
from .engine import choose_plan, gather
from .gradient_sums import GradientSums, Gram, Moment, Outer, StatisticName
from .input_moments import Energies, InputMoments
from .job import Job, Limits
from .modes import MODES, sweep
from .partial_sums import delete_sums
from .passes import check_losses, progress
from .plan import Plan

__all__ = [
    "MODES",
    "Checkpoint",
    "Collector",
    "Energies",
    "GradientSource",
    "GradientSums",
    "Gram",
    "InputMoments",
    "Job",
    "Limits",
    "Moment",
    "MomentSource",
    "Outer",
    "Plan",
    "Shape",
    "StatisticName",
    "at_each_block",
    "check_losses",
    "choose_plan",
    "delete_sums",
    "find_blocks",
    "gather",
    "hidden_states",
    "progress",
    "remove_checkpoint",
    "sweep",
]
