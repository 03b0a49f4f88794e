"""The identity of a base model: its name, and hashes of its parts, which are compared one by one.

There are two. ``identify`` takes the model as it is in memory, to the bit: the same hashes mean the same outputs.
``identify_base`` takes what every load of the same base shares, whatever its type or quantisation: an adapter that was
made on one of them fits the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from ..data import read_json
from ..errors import AdapterError
from ._base_files import (
    find_files,
    generation_settings,
    hash_json,
    hub_snapshot,
    identify_files,
    identify_weight_files,
)
from ._weights_hash import hash_embeddings, hash_rounded_weights, hash_weights
from .adapter_files import FORGET_RECORD_NAME, PROVENANCE_NAME
from .stack import adapter_configs, base_model

WEIGHTS_HASH_FILE = Path(__file__).with_name("_weights_hash.py")
"""A file that hashes weights (``hash_rounded_weights``, ``hash_embeddings``) and imports nothing of the package."""

# What a config says of how the model was loaded or is called, and what has a part of its own.
_NO_ARCHITECTURE = {
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "quantization_config", "id2label", "label2id",
    "distributed_config",
}  # fmt: skip


def base_name(model: nn.Module) -> str | None:
    """The name or path that the base model was loaded from, or None if the model does not know it.

    A path in the cache of the hub is given as the hub id, which holds on other machines.
    """
    name = _loaded_from(model)
    snapshot = hub_snapshot(name) if name else None
    return snapshot[0] if snapshot else name


def base_revision(model: nn.Module) -> str | None:
    """The commit of the hub that the base model was loaded from, or None if the model does not know it."""
    name = _loaded_from(model)
    snapshot = hub_snapshot(name) if name else None
    return snapshot[1] if snapshot else getattr(base_model(model).config, "_commit_hash", None)


def identify(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """Part -> hash, of all that a model's outputs depend on: its weights, quantisation and architecture.

    With a tokenizer, also what its texts depend on: the tokenizer, the chat template and the generation settings.

    Args:
        model: the model in memory. The adapters on it are no part of its identity.
        tokenizer: the model's, if texts go in and out.
    """
    base: Any = base_model(model)
    values = _to_dict(getattr(base, "config", None))
    parts: dict[str, Any] = {
        "quantisation": values.get("quantization_config"),
        "architecture": _architecture(values),
    }
    if tokenizer is not None:
        parts |= {
            "tokenizer": _tokenization(tokenizer),
            "chat template": getattr(tokenizer, "chat_template", None),
            "generation settings": generation_settings(_to_dict(getattr(base, "generation_config", None))),
        }
    return {"weights": hash_weights(base), **{name: hash_json(value) for name, value in parts.items()}}


def identify_base(model: nn.Module) -> dict[str, Any]:
    """What ``compare_bases`` compares, as JSON.

    It holds hashes of the weights and of the embeddings in memory, in bfloat16, where these do not depend on how the
    model was loaded; and of the parts of the files that it was loaded from, where these are on this machine.
    """
    base, name = base_model(model), _loaded_from(model)
    return {
        "weights_sha256": hash_rounded_weights(base),
        "embeddings_sha256": hash_embeddings(base),
        "files": identify_base_files(name, base_revision(model)) if name else None,
    }


def identify_base_files(name: str, revision: str | None = None) -> dict[str, str | None] | None:
    """The part of ``identify_base`` that is about the files; None where they are not on this machine.

    Args:
        name: a directory, a GGUF file or a hub id.
        revision: the branch, tag or commit of a hub model; None for its default branch.
    """
    directory = find_files(name, revision)
    return identify_files(directory) if directory else None


def compare_bases(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, bool]:
    """Part -> whether it is equal in two bases that ``identify_base`` describes.

    A part that one of them does not tell is left out. Weights in memory are compared rather than those in files, and
    embeddings alone where there is nothing more, as in records of earlier versions.
    """
    files, other_files = one.get("files") or {}, other.get("files") or {}
    of_memory = [(one.get(name), other.get(name)) for name in ("weights_sha256", "embeddings_sha256")]
    same = compare_files(files, other_files)
    if any(a and b and a != b for a, b in of_memory):
        same["weights"] = False
    elif all(of_memory[0]) or ("weights" not in same and all(of_memory[1])):
        same["weights"] = True
    return same


def compare_files(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> dict[str, bool]:
    """The same of the files alone. The weights of two quantisations cannot be compared, nor the tokenizer of a GGUF
    file with that of other files."""
    parts = [part for part in ("weights", "tokenizer", "chat template", "generation settings")
             if one.get(part) and other.get(part)]  # fmt: skip
    same = {part: one[part] == other[part] for part in parts}
    if one.get("quantisation") != other.get("quantisation"):
        same.pop("weights", None)
    if one.get("form") != other.get("form"):
        same.pop("tokenizer", None)
    return same


def check_base(model: nn.Module, adapter_name: str, label: str | None = None) -> None:
    """Check that an adapter was trained on the base model it is on (``compare_names``).

    Args:
        model: carries the adapter.
        adapter_name: the adapter's name on the model.
        label: what messages call the adapter, if not by that name.

    Raises:
        AdapterError: the adapter names another base.
    """
    fault = compare_names(adapter_configs(model)[adapter_name].base_model_name_or_path, _loaded_from(model))
    if fault:
        raise AdapterError(
            f"adapter {label or adapter_name!r} was trained on {fault}; load the base it was trained on (if that was "
            "only moved, correct base_model_name_or_path in its adapter_config.json)"
        )


def compare_names(claimed: str | None, actual: str | None) -> str | None:
    """Why the base that an adapter names is not the one that a model was loaded from; None where it is.

    One base has many names: paths of one directory, a hub id in any capitals, its path in the cache of the hub, a
    directory or another hub id with the same last part, a directory and the GGUF file in it, and Unsloth's
    ``NAME-bnb-4bit``. Where the files of two are both on this machine, their weights decide.
    """
    if not claimed or not actual or os.path.realpath(claimed) == os.path.realpath(actual):
        return None
    ids = [hub_snapshot(name) for name in (claimed, actual)]
    names = [snapshot[0] if snapshot else name for snapshot, name in zip(ids, (claimed, actual), strict=True)]
    are_ids = [bool(snapshot) or not os.path.exists(name) for snapshot, name in zip(ids, names, strict=True)]
    if all(are_ids) and names[0].casefold() == names[1].casefold():
        return None
    places = [find_files(name) for name in (claimed, actual)]
    if all(places):
        same = compare_files(*map(identify_weight_files, filter(None, places))).get("weights")
        if same is not None:
            return None if same else f"the base {claimed!r}, but the model is {actual!r}, whose weights differ"
    if _last_part(names[0]) == _last_part(names[1]):
        return None
    return (
        f"the base {claimed!r}, but the model is {actual!r}, which has another name, and weights that cannot be "
        "compared on this machine"
    )


def adopt_base(model: nn.Module, adapter_name: str, directory: str | Path) -> None:
    """Let an adapter on a model name it as its base, where the record beside the adapter says that its base has the
    content of this one under another name. Only the config in memory changes.

    Args:
        model: carries the adapter.
        adapter_name: the adapter.
        directory: the adapter's, with the record that this package wrote, if any.
    """
    config = adapter_configs(model)[adapter_name]
    if not compare_names(config.base_model_name_or_path, _loaded_from(model)):
        return
    recorded = recorded_base(directory)
    if recorded and compare_bases(recorded, identify_base(model)).get("weights"):
        config.base_model_name_or_path = base_name(model)


def recorded_base(directory: str | Path) -> dict[str, Any] | None:
    """What the record in an adapter's directory says of its base, as ``identify_base`` does; None without a record."""
    for name in (PROVENANCE_NAME, FORGET_RECORD_NAME):
        try:
            record = read_json(Path(directory) / name)
        except (OSError, ValueError):
            continue
        for values in (record, *(record.values() if isinstance(record, dict) else ())):
            base = values.get("base_model") if isinstance(values, dict) else None
            if isinstance(base, dict):
                return base
    return None


def _loaded_from(model: nn.Module) -> str | None:
    return getattr(getattr(base_model(model), "config", None), "_name_or_path", None) or None


def _last_part(name: str) -> str:
    return PurePath(name).name.casefold().removesuffix("-bnb-4bit").removesuffix("-unsloth")


def _to_dict(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.to_dict() if hasattr(config, "to_dict") else {}


def _architecture(values: Any) -> Any:
    """The config, and the configs in it, without what is not about the architecture."""
    if not isinstance(values, dict):
        return values
    return {str(name): _architecture(value) for name, value in values.items() if name not in _NO_ARCHITECTURE}


def _tokenization(tokenizer: Any) -> Any:
    """How a tokenizer makes tokens of text, and text of tokens. Padding and truncation are states of the last call."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor of images has one
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = None
    if backend is not None:
        rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    elif hasattr(tokenizer, "get_vocab"):
        rules = tokenizer.get_vocab()
    settings = ("special_tokens_map", "clean_up_tokenization_spaces", "add_bos_token", "add_eos_token")
    return type(tokenizer).__name__, rules, {name: getattr(tokenizer, name, None) for name in settings}
