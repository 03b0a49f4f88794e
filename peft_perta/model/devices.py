"""The devices that modules compute on, offloaded or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .stack import base_model


def input_device(model: nn.Module) -> torch.device:
    """The device to put token ids on: the one that the model's embeddings compute on."""
    embeddings: Any = base_model(model).get_input_embeddings()  # type: ignore[operator]
    return execution_device(embeddings)


def execution_device(module: Any) -> torch.device:
    """The device that a module computes on, which is not its weights' device if accelerate offloads them."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return next(module.parameters()).device
