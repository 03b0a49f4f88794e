"""Finding, checking and reading the files of an adapter.

Whatever reads an adapter's files passes ``check_adapter_files`` first: what is no plain LoRA adapter is refused there,
by the field of its config or the key of its tensor, before anything is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data import read_json, time_limit
from ..errors import AdapterError
from .plain_lora import check_config_values, check_lora_config

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PROVENANCE_NAME = "perta_provenance.json"
FORGET_RECORD_NAME = "perta_forget.json"

_ENDLESS = "a regular expression in it takes too long to match; write the names of the modules"

_RECORDS = "perta_*.json"  # how an adapter of this package was made

_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")  # how their keys end


def find_adapter(adapter: str | Path) -> Path:
    """The directory that holds an adapter's files, which are not looked into.

    Args:
        adapter: the directory itself; a directory above it that holds no other adapter, as a trainer's ``checkpoint-N``
            is for an adapter with a name of its own; or a name on the Hugging Face Hub, ORG/NAME, which is taken from
            its cache or downloaded.

    Raises:
        AdapterError: the directory holds several adapters, or the name is not on the hub and not in its cache.
    """
    directory = Path(adapter)
    if not directory.exists() and _is_hub_name(str(adapter)):
        return _download(str(adapter), constants.HF_HUB_CACHE)
    if (directory / CONFIG_NAME).is_file():
        return directory
    named = sorted(file.parent for file in directory.glob(f"*/{CONFIG_NAME}"))
    if len(named) > 1:
        raise AdapterError(f"{adapter} holds {len(named)} adapters, expected one; give {' or '.join(map(str, named))}")
    return named[0] if named else directory


def check_adapter_files(adapter: str | Path) -> None:
    """Check that an adapter is plain LoRA, and its files complete, intact and free of pickles; nothing is unpickled.

    Args:
        adapter: as ``find_adapter`` takes it.

    Raises:
        AdapterError: a file is missing, damaged or pickled; the config is of another kind of adapter, or has a field
            that is unknown or out of its range; a tensor is no LoRA factor, or that of a layer which the config does
            not name, or holds values that are not finite.
    """
    path = find_adapter(adapter)
    if not (path / CONFIG_NAME).is_file():
        raise AdapterError(f"{adapter} is not an adapter directory: expected {CONFIG_NAME} in it; check the path")
    config = _check_config(path)
    if not (path / WEIGHTS_NAME).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{adapter} has no {WEIGHTS_NAME}"
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
    _check_tensors(path / WEIGHTS_NAME, tensors, config)


def hash_factors(directory: Path) -> str:
    """SHA-256 of an adapter's factors by their keys, whatever else its files hold."""
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(directory / WEIGHTS_NAME).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_adapter(adapter: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and state dict of an adapter that ``check_adapter_files`` accepts."""
    path = find_adapter(adapter)
    config: Any = LoraConfig.from_pretrained(str(path))
    for name in ("target_modules", "target_parameters"):  # lists: the order of a set differs between runs
        value = getattr(config, name)
        if not isinstance(value, str):  # a regular expression
            setattr(config, name, sorted(value) if value else None)
    return config, load_file(path / WEIGHTS_NAME)


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


@functools.cache  # the files that were checked are the files that are loaded
def _download(name: str, cache: str) -> Path:
    try:
        return Path(snapshot_download(name, cache_dir=cache, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, _RECORDS]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(
            f"{name} is no directory, and no adapter of that name can be had from the Hugging Face Hub ({reason}); "
            "check the path or the name"
        ) from error


def _check_config(path: Path) -> Any:
    file = path / CONFIG_NAME
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} is not JSON ({error}); save the adapter again") from error
    check_config_values(values, str(file))
    try:
        config = LoraConfig.from_pretrained(str(path))
    except Exception as error:  # PEFT checks no file: a damaged one raises anything
        reason = " ".join(str(error).split())
        raise AdapterError(f"{file} is no config that PEFT accepts ({reason}); correct it, or save it again") from error
    check_lora_config(config, str(path))
    return config


def _check_tensors(file: Path, tensors: dict[str, Tensor], config: Any) -> None:
    foreign = [key for key in tensors if not key.endswith(_FACTORS)]
    if foreign:
        raise AdapterError(
            f"{file} holds {foreign[0]}{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}, expected LoRA "
            "factors (lora_A, lora_B) alone: PEFT would write it over the base's own weight; save the adapter with "
            "save_embedding_layers=False, and train it without new tokens"
        )
    with time_limit(AdapterError(f"{file.with_name(CONFIG_NAME)}: {_ENDLESS}")):
        matches = {
            key: _match(key.removeprefix("base_model.model.").rpartition(".lora_")[0], config) for key in tensors
        }
    for key, tensor in tensors.items():
        is_named, rank = matches[key]
        if not is_named:
            raise AdapterError(
                f"{file} holds {key}, a factor of a layer that {CONFIG_NAME} does not name (target_modules, "
                "exclude_modules, layers_to_transform); copy the two files from one adapter"
            )
        is_B = key.endswith((".lora_B.weight", ".lora_embedding_B"))
        found = tensor.shape[-1 if is_B else 0] if tensor.ndim == 2 else 0
        packed = config.target_parameters and found > 0 and found % rank == 0  # the factors of all experts
        if found != rank and not packed:
            raise AdapterError(
                f"{file}: {key} has the shape {tuple(tensor.shape)}, expected the rank {rank} of {CONFIG_NAME}; copy "
                "the two files from one adapter"
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{file}: {key} holds NaN or infinite values; train the adapter again")


def check_patterns(adapter: str | Path, names: Iterable[str]) -> None:
    """Check that an adapter's config tells within seconds which of a model's modules it adapts.

    Args:
        adapter: as ``find_adapter`` takes it; ``check_adapter_files`` accepts it.
        names: of the modules.

    Raises:
        AdapterError: a regular expression in the config takes longer.
    """
    config: Any = LoraConfig.from_pretrained(str(find_adapter(adapter)))
    with time_limit(AdapterError(f"{adapter}: {_ENDLESS}")):
        for name in names:
            _match(name, config)


def _match(layer: str, config: Any) -> tuple[bool, int]:
    """Whether the config adapts a layer, and at which rank; each of its patterns is tried, as PEFT does.

    Only a model tells which layers are linear or hold experts: where the config leaves it to that, every layer counts.
    """
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    get_pattern_key(alphas.keys(), layer)
    rank = ranks.get(get_pattern_key(ranks.keys(), layer), config.r)
    if config.target_parameters or config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        excluded = config.exclude_modules
        return not (isinstance(excluded, str) and re.fullmatch(excluded, layer)), rank
    return bool(check_target_module_exists(config, layer)), rank
