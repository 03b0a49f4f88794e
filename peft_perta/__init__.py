"""Take knowledge out of a language model with a LoRA adapter.

The public names, by stage. Each is imported from its room when it is first used: torch, transformers, peft and trl take
seconds to import, and ``peft-perta --help`` needs none of them.
"""

import importlib
import logging
from typing import TYPE_CHECKING

# On CPUs with AVX512-BF16, bitsandbytes warns at import that an optional inference kernel is not installed, which this
# package does not use. The line must run before bitsandbytes is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - grouped by stage, in the order of use
    # configure
    "PerTAConfig",
    "UnlearningSettings",
    "InfluenceSettings",
    "RefinementSettings",
    "WEIGHTINGS",
    "Weighting",
    # load, train
    "load_base",
    "attach_adapters",
    "train_forget_adapter",
    # unlearn
    "unlearn",
    "Unlearned",
    "add_perta_adapter",
    "get_perta_state_dict",
    "calibrate",
    "Calibration",
    "Goal",
    "train_unlearning",
    "UnlearningTrainer",
    "refine_adapter",
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
    "push_adapter",
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

_ROOMS = {  # public name -> the room that defines it
    # configure
    "PerTAConfig": "perta",
    "UnlearningSettings": "training",
    "InfluenceSettings": "influence",
    "RefinementSettings": "perta",
    "WEIGHTINGS": "perta",
    "Weighting": "perta",
    # load, train
    "load_base": "model",
    "attach_adapters": "model",
    "train_forget_adapter": "training",
    # unlearn
    "unlearn": "job",
    "Unlearned": "job",
    "add_perta_adapter": "perta",
    "get_perta_state_dict": "perta",
    "calibrate": "evaluation",
    "Calibration": "evaluation",
    "Goal": "evaluation",
    "train_unlearning": "training",
    "UnlearningTrainer": "training",
    "refine_adapter": "perta",
    "extrapolate_adapter": "adapters",
    "erase_instances": "influence",
    "modify_queries": "influence",
    "correct_responses": "influence",
    "stack_adapters": "model",
    # judge
    "evaluate": "evaluation",
    # ship
    "fuse_adapters": "adapters",
    "merge_adapters": "adapters",
    "verify_adapter": "adapters",
    "push_adapter": "adapters",
    "save_perta_adapter": "adapters",
    "load_provenance": "adapters",
    "PerTAProvenance": "adapters",
    # errors
    "PerTAError": "errors",
    "AdapterError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "NumericalError": "errors",
    "OutputError": "errors",
    "UnsupportedLayerError": "errors",
}

if TYPE_CHECKING:  # what type checkers and editors see
    from .adapters import (
        PerTAProvenance,
        extrapolate_adapter,
        fuse_adapters,
        load_provenance,
        merge_adapters,
        push_adapter,
        save_perta_adapter,
        verify_adapter,
    )
    from .errors import (
        AdapterError,
        ConfigError,
        DataError,
        NumericalError,
        OutputError,
        PerTAError,
        UnsupportedLayerError,
    )
    from .evaluation import Calibration, Goal, calibrate, evaluate
    from .influence import InfluenceSettings, correct_responses, erase_instances, modify_queries
    from .job import Unlearned, unlearn
    from .model import attach_adapters, load_base, stack_adapters
    from .perta import (
        WEIGHTINGS,
        PerTAConfig,
        RefinementSettings,
        Weighting,
        add_perta_adapter,
        get_perta_state_dict,
        refine_adapter,
    )
    from .training import UnlearningSettings, UnlearningTrainer, train_forget_adapter, train_unlearning
else:  # hidden from type checkers, which would otherwise accept any name

    def __getattr__(name: str) -> object:
        """Import a public name from its room (PEP 562)."""
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
