"""Which base model, and which adapter: names and hashes."""

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
    """SHA-256 of every weight and buffer of a model, by name, type and bytes; offloaded ones are read where they rest.

    Args:
        model: the transformers model; adapters on it are left out, which have names of their own.
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
                        held = part.detach().to("cpu").contiguous()
                        path = f"{name}.{key}".replace(".base_layer", "")
                        digest.update(f"{path} {held.dtype} {tuple(held.shape)}".encode())
                        digest.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _scales(module: nn.Module, weight: Any) -> list[Tensor]:
    """What a bitsandbytes weight means beyond its bytes."""
    state = getattr(weight, "quant_state", None)
    nested = getattr(state, "state2", None)
    of_rows = getattr(weight, "SCB", None)  # moved to the layer's state by its first forward
    if of_rows is None:
        of_rows = getattr(getattr(module, "state", None), "SCB", None)
    found = [getattr(state, "absmax", None), getattr(state, "offset", None), getattr(nested, "absmax", None), of_rows]
    return [part for part in found if isinstance(part, Tensor)]


def base_name(model: nn.Module) -> str | None:
    """The name or path that the base model was loaded from, where it has one."""
    return getattr(getattr(base_model(model), "config", None), "_name_or_path", None) or None


def hash_embeddings(model: nn.Module) -> str:
    """SHA-256 of the base's input embeddings, in bfloat16: the same in whatever type or quantisation it is loaded."""
    embeddings: Any = base_model(model).get_input_embeddings()  # type: ignore[operator]
    with align_module_device(embeddings):
        weight = embeddings.weight.detach().to("cpu", torch.bfloat16).contiguous()
        return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()


def check_base(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that names another base than the one it sits on.

    Two paths to one directory, and a hub name and a copy of it with the same last part, count as one base.

    Raises:
        AdapterError: the names differ.
    """
    claimed = adapter_configs(model)[adapter_name].base_model_name_or_path
    actual = base_name(model)
    if not claimed or not actual or os.path.realpath(claimed) == os.path.realpath(actual):
        return
    if PurePath(claimed).name != PurePath(actual).name:
        raise AdapterError(
            f"adapter {adapter_name!r} was trained on the base {claimed!r}, but the model is {actual!r}; load the base "
            "it was trained on (if that only moved, correct base_model_name_or_path in its adapter_config.json)"
        )
