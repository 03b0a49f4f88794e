"""What is emitted: low-rank factors, the adapter built of them, provenance, model card;
fuse, merge, extrapolate, verify.

Imports from: errors, data, model, evaluation.
"""

from .build import add_adapter, build_adapter
from .emitted import (
    FORGET_RECORD_NAME,
    PROVENANCE_NAME,
    EmittedAdapter,
    load_provenance,
    save_forget_adapter,
    save_perta_adapter,
)
from .extrapolate import extrapolate_adapter
from .fuse import fuse_adapters
from .low_rank import Edit, Factors, Product, factorize
from .merge import compare_merged, merge_adapters
from .model_card import model_card
from .provenance import (
    FusedProvenance,
    InfluenceProvenance,
    LayerProvenance,
    PerTAProvenance,
    Provenance,
    TrainedProvenance,
    WeightDistribution,
    describe_base,
    read_provenance,
    versions,
)
from .servable import DTYPES, SERVABLE_RANKS, servable_rank, torch_dtype
from .verify import format_checks, re_evaluate, verify_adapter

__all__ = [
    "DTYPES",
    "FORGET_RECORD_NAME",
    "PROVENANCE_NAME",
    "SERVABLE_RANKS",
    "Edit",
    "EmittedAdapter",
    "Factors",
    "FusedProvenance",
    "InfluenceProvenance",
    "LayerProvenance",
    "PerTAProvenance",
    "Product",
    "Provenance",
    "TrainedProvenance",
    "WeightDistribution",
    "add_adapter",
    "build_adapter",
    "compare_merged",
    "describe_base",
    "extrapolate_adapter",
    "factorize",
    "format_checks",
    "fuse_adapters",
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
