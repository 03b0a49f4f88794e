"""A base model in the form in which it will be served: rounded on loading, or in a GGUF file.

An adapter that was made on one form of its base changes another form by another amount.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data import note
from ..errors import ConfigError
from .gguf_files import SUFFIX, find_gguf
from .identity import identify_base_files
from .loading import load_base, load_quantised, load_skeleton
from .stack import base_model

SERVED_AS = "nf4, int8 or gguf:FILE"

_ROUNDED: dict[str, Literal["NF4", "int8"]] = {"nf4": "NF4", "int8": "int8"}
_WRITTEN_AS = {"mistral": "llama"}  # a GGUF names what llama.cpp runs a model as


def load_served(
    name: str,
    served_as: str,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    safetensors_only: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load a base as it will be served, and its tokenizer; adapters that were made on any form of the base go onto it.

    Args:
        name: the base, as ``load_base`` takes it.
        served_as: 'nf4' or 'int8', by bitsandbytes as transformers serves them; or 'gguf:FILE', a GGUF of the base,
            dequantised, with its own tokenizer and chat template.
        dtype: the type of the computation; the default is that of ``load_base``.
        revision: the branch, tag or commit of a hub model.
        device_map: as ``load_base`` takes it.
        safetensors_only: as ``load_base`` takes it.

    Raises:
        ConfigError: the form is unknown, the base cannot be loaded, or the GGUF is missing or of another model: it has
            another architecture, or a weight of another shape. Nothing was loaded then.
    """
    kind, _, file = served_as.partition(":")
    if kind == "gguf" and file:
        gguf = _copy_of(name, file, revision)
        return load_base(str(gguf), dtype=dtype, device_map=device_map)
    if served_as not in _ROUNDED:
        raise ConfigError(f"served as {served_as!r}: expected {SERVED_AS}")
    return load_quantised(
        name, _ROUNDED[served_as], dtype=dtype, revision=revision, device_map=device_map,
        safetensors_only=safetensors_only,
    )  # fmt: skip


def _copy_of(name: str, file: str, revision: str | None) -> Path:
    """The GGUF file, which has the architecture and the shapes of the base; whether it has its weights, rounded, cannot
    be seen."""
    gguf = find_gguf(file)
    if gguf is None:
        raise ConfigError(f"served as gguf:{file}: expected a GGUF file of the base, found none")
    base, copy = load_skeleton(name, revision=revision), load_skeleton(str(gguf))
    expected, found = base.config.model_type, copy.config.model_type
    remedy = f"name a GGUF that was made from {name}"
    if found != _WRITTEN_AS.get(expected, expected):
        raise ConfigError(f"{gguf}: expected the architecture {expected}, found {found}; {remedy}")
    ours, theirs = _shapes(base), _shapes(copy)
    for weight in {**ours, **theirs}:
        if ours.get(weight) != theirs.get(weight):
            raise ConfigError(
                f"{gguf}: expected {weight} {_shown(ours.get(weight))}, found it {_shown(theirs.get(weight))}; {remedy}"
            )
    note(f"{gguf} is taken for a copy of {name}")
    return gguf


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}


def _shown(shape: tuple[int, ...] | None) -> str:
    return f"of shape {shape}" if shape else "absent"


def describe_weights(model: nn.Module) -> str:
    """How a model holds the weights of its base: 'NF4', 'int8', another quantiser's name or a type such as 'float32',
    and the GGUF file that they come from, with the start of the hash of its weights."""
    base: Any = base_model(model)
    config = getattr(base, "config", None)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None and not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    form = _quantiser(quantisation) if quantisation else str(next(base.parameters()).dtype).removeprefix("torch.")
    name = getattr(config, "_name_or_path", None) or ""
    if Path(name).suffix != SUFFIX:
        return form
    digest = (identify_base_files(name) or {}).get("weights") or "unknown"
    return f"{form} of {Path(name).name} (weights {digest[:16]})"


def _quantiser(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "4-bit")).upper()
    return str(settings.get("quant_method", "quantised"))
