"""Names and hashes that identify a base model."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePath
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import AdapterError
from .stack import adapter_configs, base_model


def hash_model(model: nn.Module) -> str:
    """SHA-256 of the names, types and bytes of a model's weights and buffers, offloaded ones included.

    Args:
        model: the transformers model. The weights of adapters on it are left out.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        with align_module_device(module):
            for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in tensors.items():
                    if tensor is None or (kind == "buffer" and key in module._non_persistent_buffers_set):
                        continue
                    for part in (tensor, *_scales(module, tensor)):
                        values = part.detach().to("cpu").contiguous()
                        path = f"{name}.{key}".replace(".base_layer", "")
                        digest.update(f"{path} {values.dtype} {tuple(values.shape)}".encode())
                        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _scales(module: nn.Module, weight: Any) -> list[Tensor]:
    """The quantisation scales and offset of a bitsandbytes weight; empty for other weights."""
    state = getattr(weight, "quant_state", None)
    nested = getattr(state, "state2", None)
    row_scales = getattr(weight, "SCB", None)
    if row_scales is None:  # the first forward moved them to the layer's state
        row_scales = getattr(getattr(module, "state", None), "SCB", None)
    scales = [
        getattr(state, "absmax", None), getattr(state, "offset", None), getattr(nested, "absmax", None), row_scales
    ]  # fmt: skip
    return [part for part in scales if isinstance(part, Tensor)]


def base_name(model: nn.Module) -> str | None:
    """The name or path that the base model was loaded from, or None if the model does not know it."""
    return getattr(getattr(base_model(model), "config", None), "_name_or_path", None) or None


def hash_embeddings(model: nn.Module) -> str:
    """SHA-256 of the base model's input embeddings in bfloat16; independent of the type or quantisation it has."""
    embeddings: Any = base_model(model).get_input_embeddings()  # type: ignore[operator]
    with align_module_device(embeddings):
        weight = embeddings.weight.detach().to("cpu", torch.bfloat16).contiguous()
        return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()


def check_base(model: nn.Module, adapter_name: str, label: str | None = None) -> None:
    """Check that an adapter was trained on the base model it is on, by name.

    Two paths to the same directory are the same base; so are a hub name and a directory with the same last part.

    Args:
        model: carries the adapter.
        adapter_name: the adapter's name on the model.
        label: what messages call the adapter, if not by that name.

    Raises:
        AdapterError: the adapter names another base.
    """
    claimed = adapter_configs(model)[adapter_name].base_model_name_or_path
    actual = base_name(model)
    if not claimed or not actual or os.path.realpath(claimed) == os.path.realpath(actual):
        return
    if PurePath(claimed).name != PurePath(actual).name:
        raise AdapterError(
            f"adapter {label or adapter_name!r} was trained on the base {claimed!r}, but the model is {actual!r}; "
            "load the base it was trained on (if that was only moved, correct base_model_name_or_path in its "
            "adapter_config.json)"
        )
