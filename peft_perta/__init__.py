"""Take knowledge out of a language model with a LoRA adapter.

The public names, by stage.
"""

import logging

# On CPUs with AVX512-BF16, bitsandbytes warns at import that an optional inference kernel is not installed; nothing
# here would use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .adapters import (
    PerTAProvenance,
    extrapolate_adapter,
    fuse_adapters,
    load_provenance,
    merge_adapters,
    save_perta_adapter,
    verify_adapter,
)
from .errors import AdapterError, ConfigError, DataError, NumericalError, OutputError, PerTAError, UnsupportedLayerError
from .evaluation import Calibration, Goal, calibrate, evaluate
from .influence import InfluenceSettings, correct_responses, erase_instances, modify_queries
from .model import attach_adapters, load_base, stack_adapters
from .perta import WEIGHTINGS, PerTAConfig, Weighting, add_perta_adapter, get_perta_state_dict
from .training import UnlearningSettings, UnlearningTrainer, train_forget_adapter, train_unlearning

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - grouped by stage, in the order of use
    # configure
    "PerTAConfig",
    "UnlearningSettings",
    "InfluenceSettings",
    "WEIGHTINGS",
    "Weighting",
    # load, train
    "load_base",
    "attach_adapters",
    "train_forget_adapter",
    # unlearn
    "add_perta_adapter",
    "get_perta_state_dict",
    "calibrate",
    "Calibration",
    "Goal",
    "train_unlearning",
    "UnlearningTrainer",
    "extrapolate_adapter",
    "erase_instances",
    "modify_queries",
    "correct_responses",
    "stack_adapters",
    # judge
    "evaluate",
    # ship
    "fuse_adapters",
    "merge_adapters",
    "verify_adapter",
    "save_perta_adapter",
    "load_provenance",
    "PerTAProvenance",
    # errors
    "PerTAError",
    "AdapterError",
    "ConfigError",
    "DataError",
    "NumericalError",
    "OutputError",
    "UnsupportedLayerError",
]
