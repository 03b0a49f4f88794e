"""The weight files of a base model on disk: where they are, and which tensors they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, ConfigError

_INDEX = "model.safetensors.index.json"

_SINGLE = "model.safetensors"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class WeightFiles:
    """A model directory with its weights in safetensors files.

    Attributes:
        directory: the directory.
        shards: file name -> keys of the tensors in it.
    """

    directory: Path
    shards: dict[str, list[str]]

    @classmethod
    def find(cls, model_name: str, revision: str | None) -> WeightFiles:
        """The weight files of a model directory or a hub name; those of a hub name are downloaded.

        Raises:
            ConfigError: they cannot be downloaded or read.
        """
        directory = _locate(model_name, revision)
        try:
            names = [_SINGLE]
            if (directory / _INDEX).is_file():
                names = sorted(set(json.loads((directory / _INDEX).read_text())["weight_map"].values()))
            shards = {}
            for name in names:
                with safe_open(directory / name, framework="pt") as file:
                    shards[name] = list(file.keys())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the weights in {directory} cannot be read ({type(error).__name__}: {error}); expected {_SINGLE}, or "
                f"{_INDEX} and its shards"
            ) from error
        return cls(directory, shards)

    def match(self, parameters: Iterable[str], base: Any) -> dict[str, str]:
        """Tensor key -> parameter of the base model. Files may omit or add the base model's prefix.

        Raises:
            AdapterError: a parameter is in none of the files.
        """
        prefix = getattr(base, "base_model_prefix", "") + "."
        keys = {key for shard in self.shards.values() for key in shard}
        matched = {}
        for name in parameters:
            spellings = (name, name.removeprefix(prefix), prefix + name)
            key = next((spelling for spelling in spellings if spelling in keys), None)
            if key is None:
                raise AdapterError(
                    f"{name} is adapted, but the files in {self.directory} hold no tensor of that name (they hold "
                    f"{sorted(keys)[:3]}, ...). Weights that transformers renames or packs on loading (experts) cannot "
                    "be merged file by file: load the model in full precision and use PEFT's merge_and_unload"
                )
            matched[key] = name
        return matched

    def copy_other_files(self, target: Path, *, without: str) -> None:
        """Copy every file that holds no weights: config, tokenizer, licence, and the index."""
        for file in sorted(self.directory.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name != without:
                shutil.copyfile(file, target / file.name)


def _locate(model_name: str, revision: str | None) -> Path:
    if Path(model_name).is_dir():
        return Path(model_name)
    try:
        return Path(snapshot_download(model_name, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the files of {model_name!r} cannot be downloaded ({str(error).splitlines()[0]}); expected a model "
            "directory or the name of a hub model"
        ) from error
