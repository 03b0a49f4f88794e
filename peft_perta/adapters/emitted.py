"""Factors -> a plain LoRA adapter, on a model or in a directory. The only code that knows PEFT's file format.

The adapter is what every server takes: one rank, lora_alpha equal to it, no rsLoRA, no patterns, no bias, every layer
of a projection type present (zero where nothing changes). PEFT lays out the keys: it builds the empty adapter on a
weightless copy of the model, and we fill its slots.
"""

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

from ..data import replaced_directory
from ..errors import AdapterError, NumericalError, OutputError
from ..evaluation import Calibration
from ..model import CONFIG_NAME, WEIGHTS_NAME, hash_file
from .build import add_adapter
from .model_card import model_card
from .provenance import FusedProvenance, PerTAProvenance, Provenance, read_provenance

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


class EmittedAdapter(NamedTuple):
    """A plain LoRA adapter that this package made. It unpacks to its three parts.

    Attributes:
        lora_config: PEFT's config; one rank for all layers, ``lora_alpha`` equal to it.
        state_dict: PEFT's keys -> factors; A is [R, in], B is [out, R].
        provenance: what the adapter was made from, and how.
    """

    lora_config: LoraConfig
    state_dict: dict[str, Tensor]
    provenance: Any  # a Provenance: which one, the function that emits the adapter says

    def save(self, path: str | Path, *, license_name: str | None = None) -> Path:
        """Write the adapter's directory; see ``save_perta_adapter``."""
        return save_perta_adapter(path, *self, license_name=license_name)

    def add_to(self, model: nn.Module, adapter_name: str) -> None:
        """Put the adapter on the model, frozen and not active; see ``add_adapter``."""
        add_adapter(model, self.lora_config, self.state_dict, adapter_name)

    def scaled(self, factor: float) -> EmittedAdapter:
        """The negative adapter at ``factor`` times its strength: B is scaled, and the provenance says so.

        Raises:
            AdapterError: it is no negative adapter of PerTA, so that its strength has no scale.
            NumericalError: the factor is not finite, or the result overflows the adapter's dtype.
        """
        if not isinstance(self.provenance, PerTAProvenance):
            raise AdapterError(
                f"expected a negative adapter that unlearn made, found one of {type(self.provenance).__name__}; of "
                "fused adapters, scale the parts"
            )
        state_dict = {key: B * factor if ".lora_B." in key else B for key, B in self.state_dict.items()}
        if not all(bool(torch.isfinite(value).all()) for value in state_dict.values()):
            raise NumericalError(f"a strength {factor!r} times as large is not finite in the adapter's dtype")
        return EmittedAdapter(self.lora_config, state_dict, self.provenance.scaled(factor))

    def with_calibration(self, calibration: Calibration) -> EmittedAdapter:
        """The same adapter, with the search for its strength in its provenance.

        Raises:
            AdapterError: the adapter's provenance holds no such search.
        """
        if not isinstance(self.provenance, (PerTAProvenance, FusedProvenance)):
            raise AdapterError(f"the provenance of {type(self.provenance).__name__} holds no search for a strength")
        return self._replace(provenance=replace(self.provenance, calibration=calibration.to_dict()))


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
