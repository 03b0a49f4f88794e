"""Checking and reading the files of an adapter directory."""

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
PROVENANCE_NAME = "perta_provenance.json"
FORGET_RECORD_NAME = "perta_forget.json"


def check_adapter_files(path: str | Path) -> None:
    """Check that an adapter directory is complete, intact and free of pickles; nothing is unpickled.

    Raises:
        AdapterError: a file is missing, damaged or pickled, or holds values that are not finite.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise AdapterError(f"{path} is not an adapter directory: expected {CONFIG_NAME} in it; check the path")
    try:
        values = json.loads((path / CONFIG_NAME).read_text())
    except ValueError as error:
        raise AdapterError(f"{path / CONFIG_NAME} is not JSON ({error}); save the adapter again") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path / CONFIG_NAME} holds a {type(values).__name__}, expected an object; save it again")
    if not (path / WEIGHTS_NAME).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{path} has no {WEIGHTS_NAME}"
            + (
                ", only a pickled adapter_model.bin, which is never loaded because it can run code; save it with "
                "safe_serialization"
                if pickled
                else "; save the adapter with save_pretrained"
            )
        )
    try:
        tensors = load_file(path / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path / WEIGHTS_NAME} is damaged ({error}); copy or save it again") from error
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{path / WEIGHTS_NAME}: {key} holds NaN or infinite values; train the adapter again")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_adapter(path: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and state dict of an adapter directory that ``check_adapter_files`` accepts."""
    config: Any = LoraConfig.from_pretrained(str(path))
    for name in ("target_modules", "target_parameters"):  # lists: the order of a set differs between runs
        value = getattr(config, name)
        setattr(config, name, sorted(value) if value else None)
    return config, load_file(Path(path) / WEIGHTS_NAME)
