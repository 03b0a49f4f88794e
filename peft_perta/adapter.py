"""Factors -> a plain LoRA adapter, on a model or in a directory. The only code that knows PEFT's file format.

The adapter is what every server takes: one rank, lora_alpha equal to it, no rsLoRA, no patterns, no bias, every layer
of a projection type present (zero where nothing changes). PEFT lays out the keys: it builds the empty adapter on a
weightless copy of the model, and we fill its slots.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .card import model_card
from .config import PerTAConfig
from .errors import AdapterError, NumericalError, OutputError
from .factorize import Factors
from .layers.experts import packed_factors
from .output import replaced_directory
from .report import PerTAReport, Report, read_report
from .targets import base_model, base_name, check_new_name

PROVENANCE_NAME = "perta_provenance.json"
STRENGTH_NAME = "strength.json"
FORGET_RECORD_NAME = "perta_forget.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def build_adapter(
    model: nn.Module, factors: Mapping[str, Factors], rank: int, dtype: torch.dtype, *, patterned: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA config and state dict of one uniform rank, from factors per layer name. The model is only looked at.

    Args:
        patterned: give each layer the rank of its factors instead, in PEFT's ``rank_pattern``; others have rank 1.

    Raises:
        NumericalError: a factor is not finite in ``dtype``.
    """
    layers, experts = _by_module(factors)
    projections = sorted({name.rpartition(".")[2] for name in layers})
    parameters = _expert_parameters(model) if experts else []
    base = base_model(model)
    ranks = {name: found.rank for name, found in layers.items()} if patterned else {}
    rank = 1 if patterned else rank
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),  # every scaling is 1
        target_modules=projections,
        target_parameters=parameters or None,
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base_name(model),
    )
    with torch.device("meta"):
        skeleton = get_peft_model(type(base)(base.config), config)  # shapes only: no memory, no random numbers
    for path, module in skeleton.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        A: Any = module.lora_A["default"]
        B: Any = module.lora_B["default"]
        name = path
        if isinstance(module, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
        if name in experts:
            found = [experts[name][expert].padded(rank) for expert in sorted(experts[name])]
            values = packed_factors([(f.A, f.B) for f in found])
        elif name in layers:
            padded = layers[name].padded(ranks.get(name, rank))
            values = padded.A, padded.B
        else:
            values = torch.zeros(A.weight.shape), torch.zeros(B.weight.shape)
        for slot, value in zip((A, B), values, strict=True):
            if slot.weight.shape != value.shape:
                raise AdapterError(
                    f"{name}: a factor of shape {tuple(value.shape)} for a slot of {tuple(slot.weight.shape)}; "
                    "is the model's config the one that it was built from?"
                )
            stored = value.detach().to("cpu", dtype).contiguous()
            if not bool(torch.isfinite(stored).all()):
                raise NumericalError(f"{name}: a factor is not finite in {dtype}; use dtype='bfloat16' or 'float32'")
            slot.weight = nn.Parameter(stored, requires_grad=False)
    saved = get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    state_dict = {key: value.detach() for key, value in saved.items()}
    config.base_model_name_or_path = base_name(model)
    # Lists: PEFT makes them sets, whose order is not that of two runs.
    config.target_modules, config.target_parameters = projections, parameters or None
    return config, state_dict


def _expert_parameters(model: Any) -> list[str]:
    """As the model's adapters spell them: PEFT stacks no adapter that spells them otherwise."""
    return sorted(next(config.target_parameters for config in model.peft_config.values() if config.target_parameters))


def _by_module(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], dict[str, dict[int, Factors]]]:
    """(layer name -> factors, path of an expert parameter -> expert -> factors)."""
    layers: dict[str, Factors] = {}
    experts: dict[str, dict[int, Factors]] = {}
    for name, found in factors.items():
        path, bracket, expert = name.partition("[")
        if bracket:
            experts.setdefault(path, {})[int(expert.rstrip("]"))] = found
        else:
            layers[name] = found
    return layers, experts


def add_adapter(model: nn.Module, config: LoraConfig, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Put the adapter on the model, frozen and not active; what is on stays on.

    Raises:
        AdapterError: the name is taken or dotted, or the state dict does not fit the model.
    """
    check_new_name(model, adapter_name)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng():  # PEFT draws the initial A, which is then overwritten
            if isinstance(model, PeftModel):
                model.add_adapter(adapter_name, config)
            else:
                active = model.active_adapters()  # type: ignore[operator]
                model.add_adapter(config, adapter_name)  # type: ignore[operator]
                model.set_adapter(active)  # type: ignore[operator]
        result = set_peft_model_state_dict(model, dict(state_dict), adapter_name=adapter_name)
        missing = [key for key in result.missing_keys if f".{adapter_name}." in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
    except (RuntimeError, ValueError) as error:  # PEFT's own, for shapes and for layers that are not there
        if adapter_name in model.peft_config:  # type: ignore[operator]
            model.delete_adapter(adapter_name)  # type: ignore[operator]
        raise AdapterError(
            f"the adapter does not fit this model: {' '.join(str(error).split())[:300]}; was it made for another "
            "architecture?"
        ) from error
    finally:
        for parameter, was_required in required:
            parameter.requires_grad_(was_required)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            parameter.requires_grad_(False)


def save_perta_adapter(
    path: str | Path,
    lora_config: LoraConfig,
    state_dict: Mapping[str, Tensor],
    report: Report,
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
        provenance = {"format": 1, "files": files, **report.to_dict()}
        (directory / PROVENANCE_NAME).write_text(json.dumps(provenance, indent=1) + "\n")
        (directory / "README.md").write_text(model_card(report, license_name))
        if isinstance(report, PerTAReport) and report.calibration is not None:
            (directory / STRENGTH_NAME).write_text(json.dumps(report.calibration, indent=1) + "\n")
    return Path(path)


def scaled_adapter(
    state_dict: Mapping[str, Tensor], report: PerTAReport, factor: float
) -> tuple[dict[str, Tensor], PerTAReport]:
    """The same adapter at ``factor`` times its strength: a scalar into B, and into the report.

    Raises:
        NumericalError: the factor is not finite, or the result overflows its dtype.
    """
    scaled = {key: value * factor if ".lora_B." in key else value for key, value in state_dict.items()}
    if not all(bool(torch.isfinite(value).all()) for value in scaled.values()):
        raise NumericalError(f"a strength {factor!r} times as large is not finite in the adapter's dtype")
    layers = [dataclasses.replace(layer, edit_norm=layer.edit_norm * abs(factor)) for layer in report.layers]
    config = {**report.config, "strength": report.config["strength"] * factor}
    return scaled, dataclasses.replace(report, config=config, layers=layers)


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


def load_provenance(path: str | Path) -> tuple[Report, dict[str, str]]:
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
        return read_report(values), files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file} is damaged ({error}); emit the adapter anew") from error


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


def _write_weights(directory: Path, state_dict: Mapping[str, Tensor]) -> None:
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in state_dict.items()}
    try:
        save_file(tensors, directory / WEIGHTS_NAME, {"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"{directory} could not be written: {error}") from error


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


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def emitted_dtype(config: PerTAConfig) -> torch.dtype:
    return torch_dtype(config.dtype)
