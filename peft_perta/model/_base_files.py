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

from ..data import read_json
from ._gguf_head import GgufHead, read_head
from .gguf_files import held_ggufs

_CHUNKS, _CHUNK = 16, 256  # values that are read of a tensor
_CHUNK_BYTES = 512  # of a tensor in a GGUF file
_TEMPLATE_KEY = "tokenizer.chat_template"


def hub_snapshot(name: str) -> tuple[str, str] | None:
    """(hub id, revision) of a path in the cache of the hub, ``.../models--ORG--NAME/snapshots/HASH``; else None."""
    *_, folder, kind, revision = ("", "", *PurePath(os.path.abspath(name)).parts)
    if kind != "snapshots" or not folder.startswith("models--"):
        return None
    return "/".join(folder.split("--")[1:]), revision


def find_files(name: str, revision: str | None = None) -> Path | None:
    """The directory of a base model's files: its own, or that in the cache of the hub; of a GGUF base, the file. None
    where it is not here."""
    ggufs = held_ggufs(name)
    if len(ggufs) == 1:
        return ggufs[0]
    if os.path.isdir(name):
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(config).parent if isinstance(config, str) else None


def identify_files(place: Path) -> dict[str, str | None]:
    """Part -> hash, of a base's files; None for a part that they do not hold, or not in a form that can be compared.

    Numbers are compared in bfloat16, so that files of two floating-point types, or in other shards, have one hash.
    Those of a GGUF file are compared as they are stored.

    Args:
        place: what ``find_files`` found: a directory or a GGUF file.
    """
    return dict(_identify_gguf(*_dated(place))) if place.is_file() else _identify_directory(place)


def _identify_directory(directory: Path) -> dict[str, str | None]:
    tokenizer, generation = _json(directory / "tokenizer_config.json"), _json(directory / "generation_config.json")
    template = directory / "chat_template.jinja"
    return {
        **_identify_weights(directory),
        "tokenizer": _hash_vocabulary(directory),
        "chat template": hash_json(
            template.read_text(encoding="utf-8") if template.is_file() else tokenizer.get("chat_template")
        ),
        "generation settings": hash_json(generation_settings(generation)),
    }


def identify_weight_files(place: Path) -> dict[str, str | None]:
    """The parts of ``identify_files`` that are about the weights, or all that are read with them."""
    return identify_files(place) if place.is_file() else _identify_weights(place)


def _identify_weights(directory: Path) -> dict[str, str | None]:
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
        values = read_json(file)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _hash_shards(directory: Path) -> str | None:
    shards = ["model.safetensors"]
    if not (directory / shards[0]).is_file():  # transformers reads it, and not the index, where there are both
        shards = sorted(set(_json(directory / "model.safetensors.index.json").get("weight_map", {}).values())) or shards
    if any(PurePath(shard).name != shard for shard in shards):  # it leads out of the directory
        return None
    try:
        hashes: dict[str, str] = {}
        for shard in shards:
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


@functools.cache
def _identify_gguf(file: str, size: int, changed: int) -> Mapping[str, str | None]:
    """``identify_files`` of a GGUF file; cached by ``_dated``. Its form is told: its tokens are not written as those of
    other files are."""
    form = hash_json("GGUF")
    try:
        head = read_head(Path(file))
    except (OSError, EOFError, ValueError):
        return {"weights": None, "quantisation": form, "form": form}
    tokens = {key: value for key, value in head.values.items() if key.startswith("tokenizer.") and key != _TEMPLATE_KEY}
    return {
        "weights": _hash_gguf_weights(Path(file), size, head),
        "quantisation": form,
        "form": form,
        "tokenizer": hash_json(tokens),
        "chat template": hash_json(head.text(_TEMPLATE_KEY)),
    }


def _hash_gguf_weights(file: Path, size: int, head: GgufHead) -> str:
    """Of the settings of the architecture, and of each tensor its name, shape, type, size and bytes at even
    distances."""
    prefix = f"{head.text('general.architecture')}."
    settings = {key: value for key, value in head.values.items() if key.startswith(prefix)}
    digest = hashlib.sha256(hash_json(settings).encode())
    tensors = sorted(head.tensors, key=lambda tensor: tensor.start)
    ends = [*(tensor.start for tensor in tensors[1:]), size]
    with file.open("rb") as opened:
        for tensor, end in zip(tensors, ends, strict=True):
            digest.update(f"{tensor.name} {tensor.shape} {tensor.kind} {end - tensor.start}".encode())
            for start, length in _pieces(end - tensor.start):
                opened.seek(tensor.start + start)
                digest.update(opened.read(length))
    return digest.hexdigest()


def _pieces(size: int) -> list[tuple[int, int]]:
    """(start, length) of the bytes that are read of a tensor."""
    if size <= _CHUNKS * _CHUNK_BYTES:
        return [(0, max(size, 0))]
    return [(index * (size - _CHUNK_BYTES) // (_CHUNKS - 1), _CHUNK_BYTES) for index in range(_CHUNKS)]
