"""Unlearning methods: each takes a model with adapters on it and emits the same kind of negative adapter."""

from .extrapolation import extrapolate_adapter
from .perta import add_perta_adapter, get_perta_state_dict

__all__ = ["add_perta_adapter", "extrapolate_adapter", "get_perta_state_dict"]
