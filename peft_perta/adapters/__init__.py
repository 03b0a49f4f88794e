"""Emitted adapters: low-rank factors, the adapter that is built from them, its provenance and its model card.

The room also fuses, merges, extrapolates, exports and verifies adapters.

Imports from: errors, data, model, evaluation.
"""

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
from .servable import DTYPES, SERVABLE_RANKS, check_servable, dtype_name, servable_rank, torch_dtype
from .verify import format_checks, re_evaluate, verify_adapter

__all__ = [
    "DTYPES",
    "EXPORTS",
    "EXPORT_NAME",
    "FORGET_RECORD_NAME",
    "MERGED_NAME",
    "PROVENANCE_NAME",
    "SERVABLE_RANKS",
    "Edit",
    "EmittedAdapter",
    "ExportRecord",
    "Factors",
    "FusedProvenance",
    "InfluenceProvenance",
    "LayerProvenance",
    "PerTAProvenance",
    "Product",
    "Provenance",
    "RefinedProvenance",
    "TrainedProvenance",
    "WeightDistribution",
    "add_adapter",
    "build_adapter",
    "check_servable",
    "compare_merged",
    "describe_base",
    "dtype_name",
    "export_adapters",
    "extrapolate_adapter",
    "factorize",
    "format_checks",
    "fuse_adapters",
    "load_emitted",
    "load_provenance",
    "merge_adapters",
    "model_card",
    "re_evaluate",
    "read_provenance",
    "save_forget_adapter",
    "save_perta_adapter",
    "servable_rank",
    "torch_dtype",
    "verify_adapter",
    "versions",
]
