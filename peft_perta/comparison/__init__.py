"""Every method on one setup, and the demo.

Imports from: ...
"""

from .demo import ASSETS, SPLITS, DemoSettings, prepare, run_demo
from .methods import METHODS, method_names
from .run import run_comparison
from .settings import ComparisonSettings
from .table import format_table

__all__ = [
    "ASSETS",
    "METHODS",
    "SPLITS",
    "ComparisonSettings",
    "DemoSettings",
    "format_table",
    "method_names",
    "prepare",
    "run_comparison",
    "run_demo",
]
