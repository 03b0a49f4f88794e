"""Factors -> a plain LoRA adapter, on a model or in a directory. The only code that knows PEFT's file format.

The adapter is what every server takes: one rank, lora_alpha equal to it, no rsLoRA, no patterns, no bias, every layer
of a projection type present (zero where nothing changes). PEFT lays out the keys: it builds the empty adapter on a
weightless copy of the model, and we fill its slots.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..data import replaced_directory
from ..errors import AdapterError, NumericalError, OutputError
from ..model import CONFIG_NAME, WEIGHTS_NAME, hash_file
from .model_card import model_card
from .provenance import PerTAProvenance, Provenance, read_provenance

PROVENANCE_NAME = "perta_provenance.json"


STRENGTH_NAME = "strength.json"


FORGET_RECORD_NAME = "perta_forget.json"


def save_perta_adapter(
    path: str | Path,
    lora_config: LoraConfig,
    state_dict: Mapping[str, Tensor],
    provenance: Provenance,
    *,
    license_name: str | None = None,
) -> Path:
    """Write a flat directory that loads anywhere: PEFT, transformers, vLLM, llama.cpp, with or without this package.

    It holds ``adapter_config.json``, ``adapter_model.safetensors``, ``perta_provenance.json`` and a model card. It is
    written under a temporary name and moved; a directory of ours is replaced, another's is refused. ``push_to_hub`` and
    ``huggingface_hub`` take it as it is.

    Args:
        license_name: for the card's metadata: an identifier that hubs know, such as 'apache-2.0'; by default 'other',
            since base and data have a say in it.

    Raises:
        OutputError: the path is not ours to write, or the disk refuses.
    """
    with replaced_directory(path, PROVENANCE_NAME) as directory:
        _write_weights(directory, state_dict)
        lora_config.save_pretrained(str(directory))
        files = {name: hash_file(directory / name) for name in (WEIGHTS_NAME, CONFIG_NAME)}
        record = {"format": 1, "files": files, **provenance.to_dict()}
        (directory / PROVENANCE_NAME).write_text(json.dumps(record, indent=1) + "\n")
        (directory / "README.md").write_text(model_card(provenance, license_name))
        if isinstance(provenance, PerTAProvenance) and provenance.calibration is not None:
            (directory / STRENGTH_NAME).write_text(json.dumps(provenance.calibration, indent=1) + "\n")
    return Path(path)


def scaled_adapter(
    state_dict: Mapping[str, Tensor], provenance: PerTAProvenance, factor: float
) -> tuple[dict[str, Tensor], PerTAProvenance]:
    """The same adapter at ``factor`` times its strength: a scalar into B, and into the report.

    Raises:
        NumericalError: the factor is not finite, or the result overflows its dtype.
    """
    scaled = {key: value * factor if ".lora_B." in key else value for key, value in state_dict.items()}
    if not all(bool(torch.isfinite(value).all()) for value in scaled.values()):
        raise NumericalError(f"a strength {factor!r} times as large is not finite in the adapter's dtype")
    layers = [dataclasses.replace(layer, edit_norm=layer.edit_norm * abs(factor)) for layer in provenance.layers]
    config = {**provenance.config, "strength": provenance.config["strength"] * factor}
    return scaled, dataclasses.replace(provenance, config=config, layers=layers)


def save_forget_adapter(path: str | Path, model: PeftModel, adapter_name: str, record: Mapping[str, Any]) -> Path:
    """Write one adapter of the model into a flat directory (PEFT puts a named one into a subfolder), with our record
    of how it was trained.

    Raises:
        OutputError: the path is not ours to write, or the disk refuses.
    """
    with replaced_directory(path, FORGET_RECORD_NAME) as directory:
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        _write_weights(directory, state_dict)
        model.peft_config[adapter_name].save_pretrained(str(directory))
        (directory / FORGET_RECORD_NAME).write_text(json.dumps({"format": 1, **record}, indent=1) + "\n")
    return Path(path)


def load_provenance(path: str | Path) -> tuple[Provenance, dict[str, str]]:
    """The report of an emitted adapter, and the SHA-256 of its files as they were written.

    Raises:
        AdapterError: the directory holds no provenance of ours, or a damaged one.
    """
    file = Path(path) / PROVENANCE_NAME
    if not file.is_file():
        raise AdapterError(f"{path} holds no {PROVENANCE_NAME}; expected a directory that save_perta_adapter wrote")
    try:
        values = json.loads(file.read_text())
        values.pop("format")
        files = values.pop("files")
        return read_provenance(values), files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file} is damaged ({error}); emit the adapter anew") from error


def _write_weights(directory: Path, state_dict: Mapping[str, Tensor]) -> None:
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in state_dict.items()}
    try:
        save_file(tensors, directory / WEIGHTS_NAME, {"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"{directory} could not be written: {error}") from error
