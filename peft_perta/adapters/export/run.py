"""Export: several adapters -> one, exactly -> the files that a runtime reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from ...data import note, replaced_directory
from ...errors import OutputError
from ...model import attach_adapters, base_name, compare_names, find_gguf, hash_file, load_skeleton
from ..fuse import combine_adapters
from .format import Format, Served

EXPORT_NAME = "perta_export.json"
COMMANDS_NAME = "SERVING.md"

_WARNING = "The base itself still knows what the adapter suppresses: whoever can leave the adapter out has it back."


@dataclass(frozen=True)
class ExportRecord:
    """The record of an export.

    Attributes:
        to: the format.
        base_model: the base's name.
        parts: name, strength and SHA-256 of the factors of each adapter.
        rank: of the one adapter.
        energy_kept: the share of the sum's squared Frobenius norm that the adapter holds; 1 where it is exact.
        commands: what serves it.
        files: file -> SHA-256.
    """

    to: str
    base_model: str
    parts: list[dict[str, Any]]
    rank: int
    energy_kept: float
    commands: list[str]
    files: dict[str, str]

    def __str__(self) -> str:
        names = " + ".join(f"{part['strength']:g} x {part['name']}" for part in self.parts)
        lines = [f"{names} for {self.to}, rank {self.rank}; {self.energy_kept:.1%} of the sum's energy kept"]
        return "\n".join([*lines, *(f"  {command}" for command in self.commands), _WARNING])


def export_adapters(
    base: str,
    adapters: Mapping[str, float],
    to: Format,
    output: str | Path,
    *,
    revision: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExportRecord:
    """Write the sum of some adapters in the files that a runtime reads. No weight of the base is loaded.

    Args:
        base: the base model that the runtime will serve.
        adapters: adapter directory -> strength.
        to: a row of ``EXPORTS``.
        output: the directory to write.
        revision: revision of a hub model.
        rank: truncate the sum to this rank; by default it is exact.
        dtype: of the factors.

    Returns:
        The record, which is also written to the directory.

    Raises:
        AdapterError: an adapter is not plain LoRA, has another base, or says what the runtime cannot.
        ConfigError: the base is of a kind that the runtime does not serve, or the rank is too large.
        OutputError: the output holds something else, or the disk refuses.
    """
    skeleton = load_skeleton(base, revision=revision)
    to.check(base, skeleton)
    directories = {f"adapter_{number}": directory for number, directory in enumerate(adapters, start=1)}
    strengths = {name: adapters[directory] for name, directory in directories.items()}
    model = attach_adapters(skeleton, directories)
    _take_for_copy(model, base, directories)
    emitted = combine_adapters(model, strengths, rank=rank, dtype=dtype, labels=directories)
    served = Served(base, revision, load_skeleton(base, revision=revision), emitted)
    with replaced_directory(output, EXPORT_NAME) as directory:
        try:
            commands = to.write(served, directory, Path(output))
        except SafetensorError as error:
            raise OutputError(f"{output} could not be written: {error}") from error
        (directory / COMMANDS_NAME).write_text(_page(to, commands), encoding="utf-8")
        record = ExportRecord(
            to=to.name,
            base_model=base,
            parts=emitted.provenance.parts,
            rank=served.rank,
            energy_kept=emitted.provenance.energy_kept,
            commands=commands,
            files={file.name: hash_file(file) for file in sorted(directory.iterdir())},
        )
        (directory / EXPORT_NAME).write_text(json.dumps({"format": 1, **asdict(record)}, indent=1), encoding="utf-8")
    return record


def _take_for_copy(model: PeftModel, base: str, directories: Mapping[str, str]) -> None:
    """Let the adapters name a GGUF file as their base: it is a copy of it, rounded, whose weights cannot be compared.

    What can be compared, the names and shapes of its tensors, the writer compares.
    """
    file = find_gguf(base)
    for name, directory in directories.items() if file is not None else ():
        config = model.peft_config[name]
        if compare_names(config.base_model_name_or_path, str(file)):
            note(f"{directory} was made on {config.base_model_name_or_path}; {file} is taken for a copy of it")
            config.base_model_name_or_path = base_name(model)


def _page(to: Format, commands: list[str]) -> str:
    listed = "\n".join(commands)
    return f"# {to.name}: {to.description}\n\n```\n{listed}\n```\n\n{_WARNING}\n"
