"""What the package does to a user's model: load it, switch its adapters, find the weights to edit, take losses.

It also preserves the model's state, identifies models by hashes, and counts memory and processes.

Imports from: errors, data.
"""

from . import distributed
from .adapter_files import (
    CONFIG_NAME,
    FORGET_RECORD_NAME,
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    check_adapter_files,
    find_adapter,
    hash_factors,
    hash_file,
    read_adapter,
)
from .devices import input_device
from .gguf_files import find_gguf, read_gguf_layout
from .identity import (
    WEIGHTS_HASH_FILE,
    base_name,
    base_revision,
    check_base,
    compare_bases,
    compare_names,
    identify,
    identify_base,
    identify_base_files,
    recorded_base,
)
from .layers import LAYER_KINDS, LayerKind, find_kind, wrapped_kind
from .loading import attach_adapters, auto_class, load_base, load_skeleton, load_tokenizer, quiet
from .losses import TokenScores, completion_logits, completion_losses, completion_states, sample_losses, token_scores
from .memory import DISK, HOST, budgets, free_memory, held_to, parse_size, peak_memory, show_size, taken
from .model_state import preserved, snapshot
from .plain_lora import BASE_CHANGING_INITS, VARIANT_FIELDS, check_lora_config
from .positions import fitting_new_tokens, row_length
from .served import SERVED_AS, describe_weights, load_served
from .stack import (
    adapter_strength,
    base_model,
    check_decoder,
    check_new_name,
    give_memory,
    remove_adapter,
    require_adapter,
    stack_adapters,
    switch_modules,
    tuner_modules,
)
from .targets import Target, changed_targets, hash_targets, resolve_layers, resolve_targets, weight_names

__all__ = [
    "BASE_CHANGING_INITS",
    "CONFIG_NAME",
    "DISK",
    "FORGET_RECORD_NAME",
    "HOST",
    "LAYER_KINDS",
    "PROVENANCE_NAME",
    "SERVED_AS",
    "VARIANT_FIELDS",
    "WEIGHTS_HASH_FILE",
    "WEIGHTS_NAME",
    "LayerKind",
    "Target",
    "TokenScores",
    "adapter_strength",
    "attach_adapters",
    "auto_class",
    "base_model",
    "base_name",
    "base_revision",
    "budgets",
    "changed_targets",
    "check_adapter_files",
    "check_base",
    "check_decoder",
    "check_lora_config",
    "check_new_name",
    "compare_bases",
    "compare_names",
    "completion_logits",
    "completion_losses",
    "completion_states",
    "describe_weights",
    "distributed",
    "find_adapter",
    "find_gguf",
    "find_kind",
    "fitting_new_tokens",
    "free_memory",
    "give_memory",
    "hash_factors",
    "hash_file",
    "hash_targets",
    "held_to",
    "identify",
    "identify_base",
    "identify_base_files",
    "input_device",
    "load_base",
    "load_served",
    "load_skeleton",
    "load_tokenizer",
    "parse_size",
    "peak_memory",
    "preserved",
    "quiet",
    "read_adapter",
    "read_gguf_layout",
    "recorded_base",
    "remove_adapter",
    "require_adapter",
    "resolve_layers",
    "resolve_targets",
    "row_length",
    "sample_losses",
    "show_size",
    "snapshot",
    "stack_adapters",
    "switch_modules",
    "taken",
    "token_scores",
    "tuner_modules",
    "weight_names",
    "wrapped_kind",
]
