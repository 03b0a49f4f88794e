"""Adapters into a full-precision copy of the base, shard by shard.

The base's own files are read, not the model that an adapter may sit on: nothing is ever merged into 4-bit weights, and
no more than one shard is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data import check_output, replaced_directory
from ..errors import AdapterError, ConfigError, NumericalError, OutputError
from ..evaluation import Subject, generate, losses_of
from ..model import (
    Target,
    adapter_strength,
    attach_adapters,
    base_model,
    check_base,
    check_lora_config,
    hash_file,
    hash_targets,
    load_base,
    load_skeleton,
    resolve_layers,
)

MERGED_NAME = "perta_merged.json"


_INDEX = "model.safetensors.index.json"


_SINGLE = "model.safetensors"


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class MergeProvenance:
    """What was merged.

    Attributes:
        base_model: name or path of the base.
        adapters: directory, strength and SHA-256 of the factors of each.
        weights: how many weights were changed.
        dtype: of the changed weights.
        rounding: ||stored - exact|| / ||edit||, Frobenius, over all changed weights: the share of the edit that their
            type could not hold.
        files: SHA-256 of the weight files.
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
            f"rounding took {self.rounding:.2%} of the edit"
        )


def merge_adapters(
    model_name: str,
    adapters: Mapping[str, float],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    show_progress_bar: bool = True,
) -> MergeProvenance:
    """Write a model directory that loads without PEFT: the base's weights plus every adapter's delta.

    Args:
        model_name: the base, a directory or a hub name, in full or 16-bit precision and in safetensors files.
        adapters: directory -> strength; the task adapter and the negative adapter, say.
        dtype: of the whole model; by default as the base's files hold it.

    Raises:
        AdapterError: an adapter is not plain LoRA, of another base, or on a weight that the files do not hold under
            its own name.
        ConfigError: the base is quantised, or its files cannot be found or read.
        NumericalError: a merged weight is not finite.
        OutputError: the output is not ours to write, or the disk refuses.
    """
    check_output(output, MERGED_NAME)
    if not adapters:
        raise AdapterError("expected at least one adapter to merge, found none")
    skeleton = load_skeleton(model_name, revision=revision)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{model_name} is quantised: rounding would undo a small edit; expected the full-precision base that it "
            "was made from"
        )
    names = {f"adapter_{number}": directory for number, directory in enumerate(adapters)}
    model = attach_adapters(skeleton, names)
    parts: dict[str, list[tuple[Target, float]]] = {}
    described = []
    for name, directory in names.items():
        check_lora_config(model.peft_config[name], str(directory))
        check_base(model, name)
        targets = resolve_layers(model, name)
        described.append(
            {"directory": str(directory), "strength": float(adapters[directory]), "sha256": hash_targets(targets)}
        )
        for target in targets:
            parts.setdefault(_weight_name(target), []).append((target, float(adapters[directory])))
    directory = _locate(model_name, revision)
    shards = _shards(directory)
    renamed = _match(parts, [key for keys in shards.values() for key in keys], base_model(model), model_name)
    error = size = 0.0
    stored_types = set()
    with replaced_directory(output, MERGED_NAME) as written:
        for shard in tqdm(shards, desc="merging shards", disable=not show_progress_bar):
            tensors = {}
            with safe_open(directory / shard, framework="pt") as file:
                metadata = file.metadata() or {"format": "pt"}
                for key in shards[shard]:
                    tensors[key] = file.get_tensor(key)
                    if key in renamed:
                        tensors[key], lost, moved = _merged(key, tensors[key], parts[renamed[key]], dtype)
                        error, size = error + lost, size + moved
                    elif dtype is not None and tensors[key].is_floating_point():
                        tensors[key] = tensors[key].to(dtype)
                    if key in renamed:
                        stored_types.add(str(tensors[key].dtype).removeprefix("torch."))
            try:
                save_file(tensors, written / shard, metadata)
            except SafetensorError as failure:
                raise OutputError(f"{output} could not be written: {failure}") from failure
        _copy_others(directory, written)
        if dtype is not None:
            config = json.loads((written / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        files = {name: hash_file(written / name) for name in shards}
        provenance = MergeProvenance(
            base_model=model_name,
            adapters=described,
            weights=len(renamed),
            dtype=", ".join(sorted(stored_types)),
            rounding=(error / size) ** 0.5 if size else 0.0,
            files=files,
        )
        (written / MERGED_NAME).write_text(json.dumps({"format": 1, **asdict(provenance)}, indent=1) + "\n")
    return provenance


def _weight_name(target: Target) -> str:
    """The parameter's path in the model: one for all experts of a parameter."""
    return target.name.partition("[")[0] if target.parameter is not None else f"{target.name}.weight"


def _locate(model_name: str, revision: str | None) -> Path:
    if Path(model_name).is_dir():
        return Path(model_name)
    try:
        return Path(snapshot_download(model_name, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the files of {model_name!r} cannot be fetched: {str(error).splitlines()[0]}") from error


def _shards(directory: Path) -> dict[str, list[str]]:
    """File name -> the tensors in it."""
    try:
        if (directory / _INDEX).is_file():
            weight_map = json.loads((directory / _INDEX).read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        else:
            names = [_SINGLE]
        found = {}
        for name in names:
            with safe_open(directory / name, framework="pt") as file:
                found[name] = list(file.keys())
        return found
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the weights in {directory} cannot be read ({type(error).__name__}: {error}); expected {_SINGLE} or "
            f"{_INDEX} with its shards"
        ) from error


def _match(parts: Mapping[str, Any], keys: list[str], base: Any, model_name: str) -> dict[str, str]:
    """Tensor in the files -> parameter in the model; files may leave out or add the base model's prefix."""
    prefix = getattr(base, "base_model_prefix", "") + "."
    known = set(keys)
    renamed = {}
    for name in parts:
        found = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in known), None)
        if found is None:
            raise AdapterError(
                f"{name} is adapted, but the files of {model_name} hold no tensor of that name (they hold "
                f"{sorted(known)[:3]}, ...); weights that transformers renames or packs while it loads (experts) "
                "cannot be merged file by file: load the model in full precision and use PEFT's merge_and_unload"
            )
        renamed[found] = name
    return renamed


def _merged(
    key: str, weight: Tensor, parts: list[tuple[Target, float]], dtype: torch.dtype | None
) -> tuple[Tensor, float, float]:
    """(the weight as it is stored, ||stored - exact||^2, ||edit||^2)."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    edit = torch.zeros_like(exact)
    for target, strength in parts:
        delta = (strength * target.scaling * target.B) @ target.A
        if target.parameter is not None:
            of_expert = edit[target.expert] if edit.dim() == 3 else edit
            of_expert += delta.T if target.transposed else delta
        else:
            edit += delta.T if target.kind.name == "conv1d" else delta
    exact += edit
    if not bool(torch.isfinite(exact).all()):
        raise NumericalError(f"{key}: the merged weight is not finite; look at the base and at the adapters' strengths")
    stored = exact.to(dtype or weight.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{key}: the merged weight is not finite in {stored.dtype}; use bfloat16 or float32")
    return stored, float((stored.double() - exact.double()).square().sum()), float(edit.double().square().sum())


def _copy_others(source: Path, target: Path) -> None:
    """Config, tokenizer, licence: everything that holds no weights, and the index."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name != MERGED_NAME:
            shutil.copyfile(file, target / file.name)


@dataclass(frozen=True)
class MergeCheck:
    """The merged model against the base with its adapters stacked, on the same rows.

    Attributes:
        rows: how many were answered.
        same_answers: how many greedy answers are the same text.
        largest_difference: between two losses of one row, nats per token.
    """

    rows: int
    same_answers: int
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"merged against stacked: {self.same_answers} of {self.rows} answers are the same, losses differ by "
            f"at most {self.largest_difference:.2g} nats per token"
        )


def compare_merged(
    model_name: str,
    adapters: Mapping[str, float],
    merged: str | Path,
    rows: Sequence[Mapping],
    *,
    revision: str | None = None,
    answered: int = 8,
) -> MergeCheck:
    """Answer rows and take their losses with the merged model and with the stack, both in float32.

    Raises:
        DataError: a row is malformed, or there is none.
    """
    found = []
    names = {f"adapter_{number}": directory for number, directory in enumerate(adapters)}
    for is_merged in (True, False):
        name = str(merged) if is_merged else model_name
        model, tokenizer = load_base(name, dtype=torch.float32, revision=None if is_merged else revision)
        on: list[str] = []
        if not is_merged:
            model = attach_adapters(model, names)
            on = list(names)
        with ExitStack() as strengths:
            for adapter in on:
                strengths.enter_context(adapter_strength(model, adapter, adapters[names[adapter]]))
            subject = Subject(model, tokenizer, on, show_progress_bar=False)
            losses = losses_of(model, subject.encode(rows, "rows"), adapters=on)
            asked = [row for row in rows if "text" not in row][:answered]
            found.append((losses, generate(subject, asked) if asked else []))
        del model
    (losses, texts), (expected, expected_texts) = found
    same = sum(text == other for text, other in zip(texts, expected_texts, strict=True))
    return MergeCheck(len(texts), same, float((losses - expected).abs().max()))
