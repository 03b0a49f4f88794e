"""The device that a module computes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .stack import base_model


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the embeddings' device, or the one that an offloaded model computes on."""
    embeddings: Any = base_model(model).get_input_embeddings()  # type: ignore[operator]
    return execution_device(embeddings)


def execution_device(module: Any) -> torch.device:
    """The device that a module computes on, wherever its weights rest."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    return next(module.parameters()).device
