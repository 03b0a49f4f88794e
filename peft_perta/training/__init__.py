"""Training of adapters: so far the forget adapter, which is what the edit is made of."""

from .forget_adapter import train_forget_adapter

__all__ = ["train_forget_adapter"]
