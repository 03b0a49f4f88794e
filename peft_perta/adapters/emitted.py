"""An emitted adapter: its three parts together, and the directory that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data import WRITTEN, read_json, replaced_directory, visible
from ..errors import AdapterError, NumericalError, OutputError
from ..evaluation import Calibration
from ..model import (
    CONFIG_NAME,
    FORGET_RECORD_NAME,
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    check_adapter_files,
    find_adapter,
    hash_file,
    read_adapter,
)
from .build import add_adapter
from .model_card import model_card
from .provenance import FusedProvenance, PerTAProvenance, Provenance, read_provenance

STRENGTH_NAME = "strength.json"


class EmittedAdapter(NamedTuple):
    """A plain LoRA adapter that this package made. It unpacks to its three parts.

    Attributes:
        lora_config: PEFT's config; one rank for all layers, ``lora_alpha`` equal to it.
        state_dict: PEFT's keys -> factors; A is [R, I], B is [O, R].
        provenance: the record of how the adapter was made (a ``Provenance``).
    """

    lora_config: LoraConfig
    state_dict: dict[str, Tensor]
    provenance: Any  # each function that emits an adapter says which kind of Provenance

    def save(self, path: str | Path) -> Path:
        """Write the adapter's directory; see ``save_perta_adapter``."""
        return save_perta_adapter(path, *self)

    def add_to(self, model: nn.Module, adapter_name: str) -> None:
        """Put the adapter on the model, frozen and switched off; see ``add_adapter``."""
        add_adapter(model, self.lora_config, self.state_dict, adapter_name)

    def scaled(self, factor: float) -> EmittedAdapter:
        """The negative adapter at ``factor`` times its strength: B is scaled, and so is the provenance's strength.

        Raises:
            AdapterError: the adapter was not made by PerTA, so it has no strength.
            NumericalError: the factor is not finite, or the result overflows the adapter's dtype.
        """
        if not isinstance(self.provenance, PerTAProvenance):
            raise AdapterError(
                f"expected a negative adapter that unlearn made, found one with {type(self.provenance).__name__}; "
                "scale the parts of a fused adapter before they are fused"
            )
        state_dict = {key: value * factor if ".lora_B." in key else value for key, value in self.state_dict.items()}
        if not all(bool(torch.isfinite(value).all()) for value in state_dict.values()):
            raise NumericalError(
                f"the adapter at {factor!r} times its strength is not finite in the adapter's dtype; use a smaller "
                "factor, or emit the adapter in float32"
            )
        return EmittedAdapter(self.lora_config, state_dict, self.provenance.scaled(factor))

    def with_calibration(self, calibration: Calibration) -> EmittedAdapter:
        """The same adapter with the search for its strength in its provenance.

        Raises:
            AdapterError: the kind of provenance has no place for such a search.
        """
        if not isinstance(self.provenance, (PerTAProvenance, FusedProvenance)):
            raise AdapterError(
                "expected the provenance of a negative or fused adapter, which can hold a calibration, found "
                f"{type(self.provenance).__name__}"
            )
        return self._replace(provenance=replace(self.provenance, calibration=calibration))


def save_perta_adapter(
    path: str | Path, lora_config: LoraConfig, state_dict: Mapping[str, Tensor], provenance: Provenance
) -> Path:
    """Write a flat adapter directory that PEFT, transformers, vLLM and llama.cpp load without this package.

    The directory holds ``adapter_config.json``, ``adapter_model.safetensors``, ``perta_provenance.json`` and a model
    card. It is written under a temporary name and then moved, so that a kill leaves the old directory or the new one.
    ``push_to_hub`` and ``huggingface_hub`` take it as it is.

    Args:
        path: the directory to write. A directory that this function wrote before is replaced; any other directory that
            is not empty is refused.
        lora_config: PEFT's config of the adapter.
        state_dict: PEFT's keys -> factors.
        provenance: the record of how the adapter was made.

    Returns:
        The path of the directory.

    Raises:
        OutputError: the path holds something else, or the disk refuses.
    """
    with replaced_directory(path, PROVENANCE_NAME) as directory:
        write_adapter_files(directory, lora_config, state_dict, provenance)
        if isinstance(provenance, PerTAProvenance) and provenance.calibration is not None:
            (directory / STRENGTH_NAME).write_text(
                json.dumps(provenance.calibration.to_dict(), indent=1) + "\n", encoding="utf-8"
            )
    return Path(path)


def write_adapter_files(
    directory: Path, lora_config: LoraConfig, state_dict: Mapping[str, Tensor], provenance: Provenance
) -> None:
    """Write the adapter's config, weights, provenance and model card into a directory that is there.

    Raises:
        OutputError: the disk refuses.
    """
    _write_weights(directory, state_dict)
    lora_config.save_pretrained(str(directory))
    files = {name: hash_file(directory / name) for name in (WEIGHTS_NAME, CONFIG_NAME)}
    record = {"format": 1, "files": files, **provenance.to_dict()}
    (directory / PROVENANCE_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(model_card(provenance), encoding="utf-8")


def save_forget_adapter(path: str | Path, model: PeftModel, adapter_name: str, record: Mapping[str, Any]) -> Path:
    """Write one adapter of the model into a flat directory, with a record of how it was trained.

    PEFT's ``save_pretrained`` would put a named adapter into a subdirectory.

    Raises:
        OutputError: the path holds something else, or the disk refuses.
    """
    with replaced_directory(path, FORGET_RECORD_NAME) as directory:
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        _write_weights(directory, state_dict)
        model.peft_config[adapter_name].save_pretrained(str(directory))
        (directory / FORGET_RECORD_NAME).write_text(
            json.dumps({"format": 1, **record}, indent=1) + "\n", encoding="utf-8"
        )
    return Path(path)


def load_emitted(path: str | Path) -> EmittedAdapter:
    """Read an emitted adapter back from its directory.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    provenance, _ = load_provenance(path)
    check_adapter_files(path)
    return EmittedAdapter(*read_adapter(path), provenance)


def load_provenance(path: str | Path) -> tuple[Provenance, dict[str, str]]:
    """Read the provenance of an emitted adapter.

    Args:
        path: a directory that ``save_perta_adapter`` wrote, or its name on the Hugging Face Hub.

    Returns:
        The provenance, and file name -> SHA-256 of the adapter's files as they were written.

    Raises:
        AdapterError: the directory holds no provenance of this package, or a damaged one.
    """
    file = find_adapter(path) / PROVENANCE_NAME
    if not file.is_file():
        raise AdapterError(f"{path} holds no {PROVENANCE_NAME}; expected a directory that save_perta_adapter wrote")
    try:
        values = _visible(read_json(file))
        if not isinstance(values, dict) or values.get("format") != 1:
            raise ValueError("expected an object of the format 1")
        files, named = values.get("files"), (WEIGHTS_NAME, CONFIG_NAME)
        if not isinstance(files, dict) or not any(name in files for name in named):
            raise ValueError(f"files: expected the hashes of {WEIGHTS_NAME} and {CONFIG_NAME}")
        record = {key: value for key, value in values.items() if key not in ("format", "files", WRITTEN)}
        return read_provenance(record), {name: str(files[name]) for name in named if name in files}
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged ({error}); emit the adapter again") from error


def _visible(value: Any) -> Any:
    """A value of a file with every text in it as a terminal and a page may show it."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [_visible(part) for part in value]
    return {visible(key): _visible(part) for key, part in value.items()} if isinstance(value, dict) else value


def _write_weights(directory: Path, state_dict: Mapping[str, Tensor]) -> None:
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in state_dict.items()}
    try:
        save_file(tensors, directory / WEIGHTS_NAME, {"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"{directory} could not be written: {error}") from error
