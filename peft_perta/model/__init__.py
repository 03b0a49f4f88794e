"""What the package does to a user's model: load it, switch its adapters, find the weights to edit, take losses.

It also preserves the model's state, identifies models by hashes, and counts memory and processes.

Imports from: errors, data.
"""

from . import distributed
from .adapter_files import CONFIG_NAME, WEIGHTS_NAME, check_adapter_files, find_adapter, hash_file, read_adapter
from .devices import input_device
from .identity import base_name, check_base, hash_embeddings, hash_model
from .layers import LAYER_KINDS, LayerKind, find_kind, wrapped_kind
from .loading import attach_adapters, load_base, load_skeleton, quiet
from .losses import TokenScores, completion_logits, completion_losses, completion_states, sample_losses, token_scores
from .memory import DISK, HOST, budgets, held_to, parse_size, show_size, taken
from .model_state import preserved, snapshot
from .plain_lora import BASE_CHANGING_INITS, VARIANT_FIELDS, check_lora_config
from .positions import fitting_new_tokens, row_length
from .stack import (
    adapter_strength,
    base_model,
    check_new_name,
    give_memory,
    require_adapter,
    stack_adapters,
    switch_modules,
    tuner_modules,
)
from .targets import Target, hash_targets, resolve_layers, resolve_targets, weight_names

__all__ = [
    "BASE_CHANGING_INITS",
    "CONFIG_NAME",
    "DISK",
    "HOST",
    "LAYER_KINDS",
    "VARIANT_FIELDS",
    "WEIGHTS_NAME",
    "LayerKind",
    "Target",
    "TokenScores",
    "adapter_strength",
    "attach_adapters",
    "base_model",
    "base_name",
    "budgets",
    "check_adapter_files",
    "check_base",
    "check_lora_config",
    "check_new_name",
    "completion_logits",
    "completion_losses",
    "completion_states",
    "distributed",
    "find_adapter",
    "find_kind",
    "give_memory",
    "fitting_new_tokens",
    "hash_embeddings",
    "hash_file",
    "hash_model",
    "hash_targets",
    "held_to",
    "input_device",
    "load_base",
    "load_skeleton",
    "parse_size",
    "preserved",
    "quiet",
    "read_adapter",
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
