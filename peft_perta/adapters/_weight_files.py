"""The weight files of a base model on disk: where they are, and which tensors they hold."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..data import read_json
from ..errors import ConfigError

_INDEX = "model.safetensors.index.json"

_SINGLE = "model.safetensors"

_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


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
            if not (directory / _SINGLE).is_file():  # transformers reads it, and not the index, where there are both
                names = sorted(set(read_json(directory / _INDEX)["weight_map"].values()))
            shards = {}
            for name in names:
                if not _belongs(directory / name, directory):
                    raise ValueError(f"{name!r} is not a file of that directory")
                with safe_open(directory / name, framework="pt") as file:
                    keys = file.keys()
                    shards[name] = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the weights in {directory} cannot be read ({type(error).__name__}: {error}); expected {_SINGLE}, or "
                f"{_INDEX} and its shards"
            ) from error
        return cls(directory, shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key of each tensor -> its shape."""
        return {key: shape for tensors in self.shards.values() for key, shape in tensors.items()}

    def copy_other_files(self, target: Path, *, without: str) -> None:
        """Copy the files of a model that hold no weights: config, tokenizer, template, licence, card and index."""
        for file in sorted(self.directory.iterdir()):
            is_of_model = file.suffix in _SUFFIXES or file.name.upper().startswith(_NAMES)
            if is_of_model and file.name != without and file.is_file() and _belongs(file, self.directory):
                shutil.copyfile(file, target / file.name)


def _belongs(file: Path, directory: Path) -> bool:
    """Whether a path names a file of a model's directory and leads nowhere else. In the cache of the hub, files are
    links to the blobs of the same repository."""
    home = directory.resolve()
    repository = home.parent.parent
    in_cache = home.parent.name == "snapshots" and repository.name.startswith("models--")
    homes = [home, repository / "blobs"] if in_cache else [home]
    return file.parent == directory and any(place in file.resolve().parents for place in homes)


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
