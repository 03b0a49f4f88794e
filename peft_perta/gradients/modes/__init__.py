"""Modes: the ways to visit the layers. One file per mode, one row each in ``MODES``.

To add a mode: its file, a row here, a row in tests/tables.py.
"""

from .grouped import Grouped, sweep
from .layerwise import Layerwise
from .mode import Mode

MODES: dict[str, Mode] = {mode.name: mode for mode in (Grouped(), Layerwise())}

__all__ = ["MODES", "Mode", "sweep"]
