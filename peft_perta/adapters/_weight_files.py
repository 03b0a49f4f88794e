"""The weight files of a base model on disk: where they are, and which tensors they hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..errors import ConfigError

_INDEX = "model.safetensors.index.json"

_SINGLE = "model.safetensors"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class WeightFiles:
    """A model directory with its weights in safetensors files.

    Attributes:
        directory: the directory.
        shards: file name -> key of each tensor in it -> its shape.
    """

    directory: Path
    shards: dict[str, dict[str, tuple[int, ...]]]

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
                    keys = file.keys()
                    shards[name] = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the weights in {directory} cannot be read ({type(error).__name__}: {error}); expected {_SINGLE}, or "
                f"{_INDEX} and its shards"
            ) from error
        return cls(directory, shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key of each tensor -> its shape."""
        return {key: shape for tensors in self.shards.values() for key, shape in tensors.items()}

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
