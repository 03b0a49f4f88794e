"""Merge adapters into a full-precision copy of the base, shard by shard.

The base's own files are read, not a loaded model. So nothing is ever merged into 4-bit weights, at most one shard is in
memory, and the files are laid out as the base's: where transformers renames or stacks tensors on loading, the edit is
added where their elements stand in the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import check_output, read_json, replaced_directory
from ..errors import AdapterError, ConfigError, NumericalError, OutputError
from ..model import (
    Target,
    attach_adapters,
    base_name,
    check_base,
    check_lora_config,
    find_gguf,
    hash_file,
    hash_targets,
    load_skeleton,
    resolve_layers,
)
from ._conversion import Conversion, Part
from ._weight_files import WeightFiles
from .servable import dtype_name

MERGED_NAME = "perta_merged.json"


@dataclass(frozen=True)
class MergeProvenance:
    """The record of a merged model.

    Attributes:
        base_model: name or path of the base.
        adapters: directory, strength and SHA-256 of the factors of each adapter.
        weights: number of weights that were changed.
        dtype: of the changed weights.
        rounding: ||stored - exact|| / ||edit|| in the Frobenius norm over all changed weights: the share of the edit
            that the dtype could not hold.
        files: weight file -> SHA-256.
    """

    base_model: str
    adapters: list[dict[str, Any]]
    weights: int
    dtype: str
    rounding: float
    files: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{len(self.adapters)} adapters merged into {self.weights} weights of {self.base_model} in {self.dtype}; "
            f"rounding lost {self.rounding:.2%} of the edit"
        )


@dataclass(frozen=True)
class _Edit:
    """The delta of one target, or the part of it that a tensor of the files holds.

    Attributes:
        target: the target.
        strength: of its adapter.
        part: the part; None where the tensor is the whole parameter.
    """

    target: Target
    strength: float
    part: Part | None

    def add_to(self, tensor: Tensor) -> None:
        """Add the delta to a tensor of the files' shape, in place."""
        target = self.target
        delta = (self.strength * target.scaling * target.B) @ target.A
        matrix = delta.T if target.transposed else delta
        if self.part is not None:
            self.part.add(matrix, tensor)
        else:
            of_weight = tensor[target.expert] if tensor.dim() == 3 else tensor
            of_weight += matrix


@dataclass
class _Edits:
    """The adapters' deltas on the tensors of the weight files, and what storing them lost so far.

    Attributes:
        of: tensor key -> the edits of it.
        dtype: of the whole merged model; None keeps the dtype of each tensor.
        squared_error: sum of ||stored - exact||^2.
        squared_norm: sum of ||edit||^2.
        stored_dtypes: the dtypes of the changed weights.
    """

    of: Mapping[str, list[_Edit]]
    dtype: torch.dtype | None
    squared_error: float = 0.0
    squared_norm: float = 0.0
    stored_dtypes: set[str] = field(default_factory=set)

    @property
    def rounding(self) -> float:
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def merge_adapters(
    model_name: str,
    adapters: Mapping[str, float],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    show_progress_bar: bool = True,
) -> MergeProvenance:
    """Write a model directory that loads without PEFT: the base's weights plus the delta of every adapter.

    Args:
        model_name: the base, as a directory or a hub name; in full or 16-bit precision, in safetensors files.
        adapters: adapter directory -> strength; for example the task adapter and the negative adapter.
        output: the directory to write.
        dtype: of the whole merged model; by default that of the base's files.
        revision: revision of a hub model.
        show_progress_bar: show a progress bar over the shards.

    Returns:
        The record of the merge, which is also written to the directory.

    Raises:
        AdapterError: an adapter is not plain LoRA, has another base, or adapts a weight that the files do not hold, or
            that transformers makes of their tensors by more than moving elements.
        ConfigError: the base is quantised, or its files cannot be found or read, or lack a weight.
        NumericalError: a merged weight is not finite.
        OutputError: the output holds something else, or the disk refuses.
    """
    check_output(output, MERGED_NAME)
    if not adapters:
        raise AdapterError("expected at least one adapter to merge, found none")
    skeleton = _full_precision_skeleton(model_name, revision)
    source = WeightFiles.find(model_name, revision)
    conversion = Conversion(load_skeleton(model_name, revision=revision), source.shapes())
    _check_whole(conversion, model_name)
    targets, described = _resolve(skeleton, adapters)
    edits = _Edits(_edits_of_files(targets, conversion), dtype)
    with replaced_directory(output, MERGED_NAME) as directory:
        for shard in tqdm(source.shards, desc="merging shards", disable=not show_progress_bar):
            _write_shard(source, shard, edits, directory)
        source.copy_other_files(directory, without=MERGED_NAME)
        if dtype is not None:
            _set_dtype(directory / "config.json", dtype)
        provenance = MergeProvenance(
            base_model=base_name(skeleton) or model_name,
            adapters=described,
            weights=len(edits.of),
            dtype=", ".join(sorted(edits.stored_dtypes)),
            rounding=edits.rounding,
            files={shard: hash_file(directory / shard) for shard in source.shards},
        )
        (directory / MERGED_NAME).write_text(
            json.dumps({"format": 1, **asdict(provenance)}, indent=1) + "\n", encoding="utf-8"
        )
    return provenance


def _full_precision_skeleton(model_name: str, revision: str | None) -> PreTrainedModel:
    if find_gguf(model_name) is not None:
        raise ConfigError(
            f"{model_name} is a GGUF file, expected the full-precision base that it was made from; or fuse the "
            "adapters, and serve them on the GGUF"
        )
    skeleton = load_skeleton(model_name, revision=revision)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{model_name} is quantised, and rounding would undo a small edit; expected the full-precision base that "
            "it was made from"
        )
    return skeleton


def _check_whole(conversion: Conversion, model_name: str) -> None:
    lacking = conversion.lacking()
    if lacking:
        raise ConfigError(
            f"the files of {model_name!r} hold no tensor for {lacking[0]} (of {len(lacking)} such weights), which "
            "transformers would draw at random; copy or download the model again"
        )


def _resolve(
    skeleton: PreTrainedModel, adapters: Mapping[str, float]
) -> tuple[list[tuple[Target, float]], list[dict[str, Any]]]:
    """(targets of all adapters with their strengths, what the provenance says of each adapter)."""
    directories = {f"adapter_{number}": directory for number, directory in enumerate(adapters)}
    model = attach_adapters(skeleton, directories)
    resolved: list[tuple[Target, float]] = []
    described = []
    for name, directory in directories.items():
        check_lora_config(model.peft_config[name], str(directory))
        check_base(model, name, str(directory))
        targets, strength = resolve_layers(model, name), float(adapters[directory])
        described.append({"directory": str(directory), "strength": strength, "sha256": hash_targets(targets)})
        resolved += [(target, strength) for target in targets]
    return resolved, described


def _edits_of_files(targets: list[tuple[Target, float]], conversion: Conversion) -> dict[str, list[_Edit]]:
    """Tensor key -> the edits of it."""
    stored = {path: conversion.stored(path) for path in {target.weight_path: None for target, _ in targets}}
    edits: dict[str, list[_Edit]] = {}
    for target, strength in targets:
        for key, part in stored[target.weight_path][target.expert or 0]:
            edits.setdefault(key, []).append(_Edit(target, strength, part))
    return edits


def _write_shard(source: WeightFiles, shard: str, edits: _Edits, directory: Path) -> None:
    tensors = {}
    with safe_open(source.directory / shard, framework="pt") as file:
        metadata = file.metadata() or {"format": "pt"}
        for key in source.shards[shard]:
            tensor = file.get_tensor(key)
            if key in edits.of:
                tensor = _merged(key, tensor, edits)
            elif edits.dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(edits.dtype)
            tensors[key] = tensor
    try:
        save_file(tensors, directory / shard, metadata)
    except SafetensorError as error:
        raise OutputError(f"{directory / shard} could not be written: {error}") from error


def _merged(key: str, weight: Tensor, edits: _Edits) -> Tensor:
    """The weight plus its edit, as it is stored."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    edit = torch.zeros_like(exact)
    for of_target in edits.of[key]:
        of_target.add_to(edit)
    exact += edit
    if not bool(torch.isfinite(exact).all()):
        raise NumericalError(f"{key}: the merged weight is not finite; check the base and the adapters' strengths")
    stored = exact.to(edits.dtype or weight.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{key}: the merged weight is not finite in {stored.dtype}; use bfloat16 or float32")
    edits.squared_error += float((stored.double() - exact.double()).square().sum())
    edits.squared_norm += float(edit.double().square().sum())
    edits.stored_dtypes.add(dtype_name(stored.dtype))
    return stored


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config = read_json(file)
    config["dtype"] = dtype_name(dtype)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
