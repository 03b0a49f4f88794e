"""Compare unlearning methods on one model, and run the demo.

Every method of ``METHODS`` makes an adapter on the same bench: one model, one forget adapter, one set of rows. The demo
is a small, printed run on the same bench.

Imports from: errors, data, model, gradients, evaluation, adapters, perta, influence, training, html_report.
"""

from .bench import Bench, prepare
from .demo import run_demo
from .intervals import kept_against
from .method import Method, as_flags
from .methods import METHODS, format_methods, method_cells, training_schedule
from .run import CONFIG_NAME, run_comparison
from .settings import MEASURES, ROWS_OF_AUTHOR, BenchSettings, ComparisonSettings, DemoSettings
from .smollm2 import TESTBEDS, read_testbed
from .table import best_method, format_table
from .testbed import ASSETS, PROSE, SPLITS, Testbed, small

__all__ = [
    "ASSETS",
    "CONFIG_NAME",
    "MEASURES",
    "METHODS",
    "PROSE",
    "ROWS_OF_AUTHOR",
    "SPLITS",
    "TESTBEDS",
    "Bench",
    "BenchSettings",
    "ComparisonSettings",
    "DemoSettings",
    "Method",
    "Testbed",
    "as_flags",
    "best_method",
    "format_methods",
    "format_table",
    "kept_against",
    "method_cells",
    "prepare",
    "read_testbed",
    "run_comparison",
    "run_demo",
    "small",
    "training_schedule",
]
