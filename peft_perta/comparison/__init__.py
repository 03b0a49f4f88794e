"""Every method on one setup, at matched forgetting and along its strength: what it costs the rows to keep."""

from .method import Made, Method, Setup
from .methods import METHODS, QUICK, method_names
from .run import run_comparison
from .settings import ComparisonSettings
from .table import format_table

__all__ = [
    "METHODS",
    "QUICK",
    "ComparisonSettings",
    "Made",
    "Method",
    "Setup",
    "format_table",
    "method_names",
    "run_comparison",
]
