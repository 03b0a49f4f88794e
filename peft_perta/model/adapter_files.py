"""The files of an adapter directory: checked, then read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterError

WEIGHTS_NAME = "adapter_model.safetensors"


CONFIG_NAME = "adapter_config.json"


def check_adapter_files(path: str | Path) -> None:
    """Refuse an adapter directory that is incomplete, damaged, or would have to be unpickled.

    Raises:
        AdapterError: with what is missing and what to do.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise AdapterError(f"{path} is no adapter directory: expected {CONFIG_NAME} in it")
    try:
        values = json.loads((path / CONFIG_NAME).read_text())
    except ValueError as error:
        raise AdapterError(f"{path / CONFIG_NAME} is not JSON ({error}); save the adapter anew") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path / CONFIG_NAME} holds a {type(values).__name__}, expected an object; save it anew")
    if not (path / WEIGHTS_NAME).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{path} has no {WEIGHTS_NAME}"
            + (
                ", only a pickled adapter_model.bin, which is never loaded: it can run code; save it with "
                "safe_serialization"
                if pickled
                else "; save the adapter with save_pretrained"
            )
        )
    try:
        tensors = load_file(path / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path / WEIGHTS_NAME} is damaged ({error}); copy or save it anew") from error
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{path / WEIGHTS_NAME}: {key} holds NaN or infinite values; train the adapter anew")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_adapter(path: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and state dict of an adapter directory whose files are in order (``check_adapter_files``)."""
    config: Any = LoraConfig.from_pretrained(str(path))
    for name in ("target_modules", "target_parameters"):  # lists: sets have another order in every run
        value = getattr(config, name)
        setattr(config, name, sorted(value) if value else None)
    return config, load_file(Path(path) / WEIGHTS_NAME)
