"""The contract of an export format, and what all formats share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import AdapterError, ConfigError
from ...model import find_gguf
from ..emitted import EmittedAdapter

_PREFIX = "base_model.model."  # of PEFT's keys


class Factored(NamedTuple):
    """The factors of one layer; its delta is B @ A.

    Attributes:
        path: the layer's path in the base model, such as ``model.layers.0.self_attn.q_proj``.
        A: [R, I].
        B: [O, R].
    """

    path: str
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Served:
    """An adapter and the base that it will be served on.

    Attributes:
        base: the base's name: a directory, a GGUF file or a hub name.
        revision: of a hub name.
        model: the base without its weights.
        emitted: the one adapter; its scaling is 1.
    """

    base: str
    revision: str | None
    model: PreTrainedModel
    emitted: EmittedAdapter

    @property
    def rank(self) -> int:
        """R."""
        return self.emitted.lora_config.r

    def layers(self) -> list[Factored]:
        """The factors of every layer, in the order of the model's.

        Raises:
            AdapterError: they belong to expert parameters.
        """
        config: Any = self.emitted.lora_config
        if config.target_parameters:
            raise AdapterError(
                f"the adapter edits expert parameters ({config.target_parameters[0]}), which only PEFT reads; merge it "
                "into the base, and serve that"
            )
        tensors, ends = self.emitted.state_dict, (".lora_A.weight", ".lora_B.weight")
        paths = [key.removeprefix(_PREFIX).removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
        return [Factored(path, *(tensors[f"{_PREFIX}{path}{end}"] for end in ends)) for path in paths]


class Format(Protocol):
    """What one runtime reads.

    Attributes:
        name: of the format, as ``--to`` takes it.
        description: one line for help texts.
    """

    name: str
    description: str

    def check(self, base: str, model: PreTrainedModel) -> None:
        """Refuse a base that the runtime does not serve, before an adapter is read.

        Raises:
            ConfigError: the base is of a kind or an architecture that was not tested.
        """
        ...

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Write the files.

        Args:
            served: the adapter and its base.
            directory: where to write now.
            output: where the directory will lie.

        Returns:
            The commands that serve the adapter.

        Raises:
            AdapterError: the runtime cannot say what the adapter says.
        """
        ...


def check_architecture(runtime: str, model: PreTrainedModel, tested: Sequence[str]) -> None:
    """Refuse a model whose type was not tested in the runtime.

    Raises:
        ConfigError: it is another.
    """
    found = model.config.model_type
    if found not in tested:
        raise ConfigError(
            f"{runtime}: expected a base of an architecture that was tested ({', '.join(tested)}), found {found}; "
            "merge the adapter into the base, and convert that"
        )


def check_no_gguf(runtime: str, base: str) -> None:
    """Refuse a base in a GGUF file.

    Raises:
        ConfigError: it is one.
    """
    if find_gguf(base) is not None:
        raise ConfigError(
            f"{runtime}: expected the base as a directory or a hub name, found the GGUF file {base}; name the model "
            "that the file was made from, or export to gguf"
        )
