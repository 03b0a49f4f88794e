"""Emitted adapters: low-rank factors, the adapter that is built from them, its provenance and its model card.

The room also fuses, merges, extrapolates, exports and verifies adapters, and keeps the ledger of the requests that
they meet.

Imports from: errors, data, model, evaluation.
"""

from .audited_card import add_audit, read_card
from .build import add_adapter, build_adapter
from .emitted import (
    FORGET_RECORD_NAME,
    PROVENANCE_NAME,
    EmittedAdapter,
    load_emitted,
    load_provenance,
    save_forget_adapter,
    save_perta_adapter,
)
from .export import EXPORT_NAME, EXPORTS, ExportRecord, export_adapters
from .extrapolate import extrapolate_adapter
from .fuse import fuse_adapters
from .ledger import (
    LEDGER_NAME,
    Ledger,
    Request,
    ServedAdapter,
    add_request,
    check_ledger,
    list_requests,
    open_adapters,
    open_rows,
    read_ledger,
    rebuild_adapter,
    record_audit,
    record_rebuilt,
    withdraw_request,
)
from .low_rank import Edit, Factors, Product, factorize
from .merge import MERGED_NAME, merge_adapters
from .merge_check import compare_merged
from .model_card import model_card
from .provenance import (
    FusedProvenance,
    InfluenceProvenance,
    LayerProvenance,
    PerTAProvenance,
    Provenance,
    RefinedProvenance,
    TrainedProvenance,
    WeightDistribution,
    describe_base,
    read_provenance,
    versions,
)
from .push import push_adapter
from .runtimes import RUNTIMES, format_runtimes, judge_runtimes
from .servable import DTYPES, SERVABLE_RANKS, check_servable, dtype_name, servable_rank, torch_dtype
from .verify import Check, format_checks, re_evaluate, verify_adapter

__all__ = [
    "DTYPES",
    "EXPORTS",
    "EXPORT_NAME",
    "FORGET_RECORD_NAME",
    "LEDGER_NAME",
    "MERGED_NAME",
    "PROVENANCE_NAME",
    "RUNTIMES",
    "SERVABLE_RANKS",
    "Check",
    "Edit",
    "EmittedAdapter",
    "ExportRecord",
    "Factors",
    "FusedProvenance",
    "InfluenceProvenance",
    "LayerProvenance",
    "Ledger",
    "PerTAProvenance",
    "Product",
    "Provenance",
    "RefinedProvenance",
    "Request",
    "ServedAdapter",
    "TrainedProvenance",
    "WeightDistribution",
    "add_adapter",
    "add_audit",
    "add_request",
    "build_adapter",
    "check_ledger",
    "check_servable",
    "compare_merged",
    "describe_base",
    "dtype_name",
    "export_adapters",
    "extrapolate_adapter",
    "factorize",
    "format_checks",
    "format_runtimes",
    "fuse_adapters",
    "judge_runtimes",
    "list_requests",
    "load_emitted",
    "load_provenance",
    "merge_adapters",
    "model_card",
    "open_adapters",
    "open_rows",
    "push_adapter",
    "re_evaluate",
    "read_card",
    "read_ledger",
    "read_provenance",
    "rebuild_adapter",
    "record_audit",
    "record_rebuilt",
    "save_forget_adapter",
    "save_perta_adapter",
    "servable_rank",
    "torch_dtype",
    "verify_adapter",
    "versions",
    "withdraw_request",
]
