"""The files of a base model on this machine, and hashes of their content."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

_CHUNKS, _CHUNK = 16, 256  # values that are read of a tensor


def hub_snapshot(name: str) -> tuple[str, str] | None:
    """(hub id, revision) of a path in the cache of the hub, ``.../models--ORG--NAME/snapshots/HASH``; else None."""
    *_, folder, kind, revision = ("", "", *PurePath(os.path.abspath(name)).parts)
    if kind != "snapshots" or not folder.startswith("models--"):
        return None
    return "/".join(folder.split("--")[1:]), revision


def find_files(name: str, revision: str | None = None) -> Path | None:
    """The directory of a base model's files: its own, or that in the cache of the hub; None where it is not here."""
    if os.path.isdir(name):
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(config).parent if isinstance(config, str) else None


def identify_files(directory: Path) -> dict[str, str | None]:
    """Part -> hash, of a base's files; None for a part that they do not hold, or not in a form that can be compared.

    Numbers are compared in bfloat16, so that files of two floating-point types, or in other shards, have one hash.
    """
    tokenizer, generation = _json(directory / "tokenizer_config.json"), _json(directory / "generation_config.json")
    template = directory / "chat_template.jinja"
    return {
        **identify_weight_files(directory),
        "tokenizer": _hash_vocabulary(directory),
        "chat template": hash_json(template.read_text() if template.is_file() else tokenizer.get("chat_template")),
        "generation settings": hash_json(generation_settings(generation)),
    }


def identify_weight_files(directory: Path) -> dict[str, str | None]:
    """The parts of ``identify_files`` that are about the weights."""
    quantisation = hash_json(_json(directory / "config.json").get("quantization_config"))
    return {"weights": _hash_shards(directory), "quantisation": quantisation}


def generation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation config says of generation."""
    of_file = ("transformers_version", "_from_model_config")
    return {name: value for name, value in config.items() if name not in of_file and value is not None}


def hash_json(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys and sets."""

    def other(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=other).encode()).hexdigest()


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _hash_shards(directory: Path) -> str | None:
    shards = set(_json(directory / "model.safetensors.index.json").get("weight_map", {}).values())
    try:
        hashes: dict[str, str] = {}
        for shard in sorted(shards) or ["model.safetensors"]:
            hashes |= _hash_tensors(*_dated(directory / shard))
    except (OSError, SafetensorError):
        return None
    return hash_json(hashes)


def _dated(file: Path) -> tuple[str, int, int]:
    """(path, size, time of change): what a cached hash of a file is of."""
    stat = file.stat()
    return os.path.realpath(file), stat.st_size, stat.st_mtime_ns


@functools.cache
def _hash_tensors(file: str, size: int, changed: int) -> dict[str, str]:
    """Tensor -> hash of its shape and of values at even distances; cached by ``_dated``."""
    hashes = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
            tensor = tensors.get_tensor(key)
            values = _sample(tensor.reshape(-1))
            values = values.to(torch.bfloat16) if tensor.is_floating_point() else values
            digest = hashlib.sha256(f"{values.dtype} {tuple(tensor.shape)}".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
            hashes[key] = digest.hexdigest()
    return hashes


def _sample(values: Tensor) -> Tensor:
    count = values.numel()
    if count <= _CHUNKS * _CHUNK:
        return values
    starts = (index * (count - _CHUNK) // (_CHUNKS - 1) for index in range(_CHUNKS))
    return torch.cat([values[start : start + _CHUNK] for start in starts])


def _hash_vocabulary(directory: Path) -> str | None:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"):
        if (directory / name).is_file():
            return _hash_tokens(*_dated(directory / name))
    return None


@functools.cache
def _hash_tokens(file: str, size: int, changed: int) -> str:
    """Of the tokens and their ids, where the file is tokenizers' own: versions of it write the rest differently; cached
    by ``_dated``."""
    values = _json(Path(file))
    if "model" not in values:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    added = {token["content"]: token["id"] for token in values.get("added_tokens") or ()}
    return hash_json([values["model"].get("vocab"), added])
