"""Compare unlearning methods on one model, and run the demo.

Every method of ``METHODS`` makes an adapter on the same bench: one model, one forget adapter, one set of rows. The demo
is a small, printed run on the same bench.

Imports from: errors, data, model, gradients, evaluation, adapters, perta, influence, training, html_report.
"""

from .bench import ASSETS, SPLITS, prepare
from .demo import run_demo
from .methods import METHODS, format_methods
from .run import run_comparison
from .settings import BenchSettings, ComparisonSettings, DemoSettings
from .table import format_table

__all__ = [
    "ASSETS",
    "METHODS",
    "SPLITS",
    "BenchSettings",
    "ComparisonSettings",
    "DemoSettings",
    "format_methods",
    "format_table",
    "prepare",
    "run_comparison",
    "run_demo",
]
