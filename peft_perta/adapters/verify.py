"""Verify an emitted adapter: its files are intact, the servers accept it, and it fits the base. One line per check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..data import Sample, read_json
from ..errors import AdapterError
from ..evaluation import losses_of
from ..model import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_adapter_files,
    compare_bases,
    compare_names,
    find_adapter,
    hash_file,
    identify_base_files,
    load_skeleton,
    recorded_base,
)
from ._fresh_process import FreshLoad, load_afresh
from ._server_rules import CONFIG_RULES, SERVERS, TENSOR_RULES, Config, Tensors, packed_experts
from .emitted import PROVENANCE_NAME, load_provenance
from .export import EXPORT_NAME, check_export

PLAIN_CHECK = "files of a plain LoRA adapter"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what is checked, and for which servers.
        passed: whether the adapter passes; None if it is intact, but of a kind that these servers do not support.
        found: what was found.
    """

    name: str
    passed: bool | None
    found: str

    @property
    def failed(self) -> bool:
        """Whether the adapter is at fault."""
        return self.passed is False

    @property
    def mark(self) -> str:
        """'pass', 'FAIL' or 'n/a'."""
        return _LABELS[self.passed]

    def __str__(self) -> str:
        return f"{self.mark:<6}{self.name:<37}{self.found}"


_LABELS = {True: "pass", False: "FAIL", None: "n/a"}


def verify_adapter(directory: str | Path, base: str | None = None, *, revision: str | None = None) -> list[Check]:
    """Check an emitted adapter directory.

    Args:
        directory: a directory that ``save_perta_adapter`` or ``export_adapters`` wrote, or its name on the Hugging Face
            Hub.
        base: the base model, as a directory, a GGUF file or a hub name. With it, the adapter is also loaded on the base
            in a fresh process, on the CPU, with PEFT and transformers alone.
        revision: revision of a hub model.

    Returns:
        The checks, passed or failed; a damaged or missing file is a failed check. Packed experts are neither: what
        servers require of them is not checked, and one line says that it is not supported.

    Raises:
        AdapterError: the directory does not exist.
    """
    directory = find_adapter(directory)
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory; expected one that peft_perta wrote")
    exported = []
    if (directory / EXPORT_NAME).is_file():
        exported = [Check(*finding) for finding in check_export(directory, base, revision)]
        if not (directory / PROVENANCE_NAME).is_file():  # no files of PEFT's
            return exported
    config, tensors = _read(directory)
    plain = _plain_check(directory)
    checks = [*exported, *_file_checks(directory), plain, *_server_checks(config, tensors)]
    if base is not None:
        layer_checks = list(_layer_checks(config, tensors, base, revision))
        loaded = load_afresh(directory, base, revision) if plain.passed else None
        checks += [*_base_checks(directory, config, base, revision, loaded), *layer_checks]
        checks += _load_checks(loaded) if loaded is not None else []
    return _without_servers(checks, config, tensors)


def _plain_check(directory: Path) -> Check:
    try:
        check_adapter_files(directory)
    except AdapterError as error:
        return Check(PLAIN_CHECK, False, str(error))
    return Check(PLAIN_CHECK, True, "factors alone, every field of the config known")


def _file_checks(directory: Path) -> Iterator[Check]:
    try:
        _, hashes = load_provenance(directory)
    except AdapterError as error:
        yield Check("provenance", False, str(error))
        return
    yield Check("provenance", True, f"{PROVENANCE_NAME} is readable")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if name not in hashes:
            yield Check(f"hash of {name}", False, "not in the provenance")
        elif not (directory / name).is_file():
            yield Check(f"hash of {name}", False, "the file is missing")
        else:
            same = hash_file(directory / name) == hashes[name]
            found = "as emitted" if same else "changed since, or the provenance is of another adapter"
            yield Check(f"hash of {name}", same, found)


def _read(directory: Path) -> tuple[Config, Tensors]:
    """The config and the tensors, each empty where it cannot be read; the checks report that."""
    try:
        config = read_json(directory / CONFIG_NAME)
    except (OSError, ValueError):
        config = {}
    try:
        tensors = load_file(directory / WEIGHTS_NAME)
    except (OSError, SafetensorError):
        tensors = {}
    return config if isinstance(config, dict) else {}, tensors


def _server_checks(config: Config, tensors: Tensors) -> Iterator[Check]:
    for name, verdict_on_config in CONFIG_RULES:
        yield Check(name, *verdict_on_config(config))
    if not tensors:
        yield Check("weights", False, f"{WEIGHTS_NAME} cannot be read, or is empty")
        return
    for name, verdict_on_tensors in TENSOR_RULES:
        yield Check(name, *verdict_on_tensors(config, tensors))


def _without_servers(checks: list[Check], config: Config, tensors: Tensors) -> list[Check]:
    """The checks; of an adapter of packed experts without those of a server, which would pass on what is not read."""
    key = packed_experts(config, tensors)
    if key is None:
        return checks
    reason = f"not supported: {key} packs the factors of all experts; serve it by PEFT, or merge it into the base"
    others = [check for check in checks if not any(server in check.name for server in SERVERS)]
    return [*others, Check(f"{', '.join(SERVERS)}: experts", None, reason)]


def _base_checks(
    directory: Path, config: Config, base: str, revision: str | None, loaded: FreshLoad | str | None
) -> Iterator[Check]:
    """Whether this is the base that the adapter was made on: by content where its record tells it, else by name."""
    found: dict[str, Any] = {"files": identify_base_files(base, revision)}
    if isinstance(loaded, FreshLoad):
        found |= {"weights_sha256": loaded.weights_sha256, "embeddings_sha256": loaded.embeddings_sha256}
    same = compare_bases(recorded_base(directory) or {}, found)
    claimed = config.get("base_model_name_or_path")
    passed = same.get("weights", False) or (bool(claimed) and compare_names(claimed, base) is None)
    yield Check("the base that it was made for", passed, f"made for {claimed!r}, verified on {base!r}")
    for part, is_same in same.items():
        weighty = part in ("weights", "tokenizer")
        other = "those of another model" if weighty else "not those it was made with: measure again what it removes"
        yield Check(f"the base's {part}", is_same or not weighty, "those it was made on" if is_same else other)


def _layer_checks(config: Config, tensors: Tensors, base: str, revision: str | None) -> Iterator[Check]:
    modules = dict(load_skeleton(base, revision=revision).named_modules())
    suffix = ".lora_A.weight"
    adapted = {key.removeprefix("base_model.model.").removesuffix(suffix) for key in tensors if key.endswith(suffix)}
    named = config.get("target_modules") or []
    if not isinstance(named, list):  # a regular expression: the keys alone say which layers there are
        named = {path.rpartition(".")[2] for path in adapted}
    expected = {
        path
        for path, module in modules.items()
        if any(f".{path}".endswith(f".{name}") for name in named) and getattr(module, "weight", None) is not None
    }
    absent = sorted(expected - adapted)
    found = f"{absent[0]} is missing" if absent else f"{len(adapted)} layers, zeros where nothing changes"
    yield Check("TGI: every layer of each projection", bool(adapted) and not absent, found)


def _load_checks(loaded: FreshLoad | str) -> Iterator[Check]:
    if isinstance(loaded, str):
        yield Check("PEFT: loads in a fresh process", False, loaded)
        return
    yield Check("the base's files", not loaded.lacking, f"lack {loaded.lacking[0]}" if loaded.lacking else "whole")
    complete = not loaded.missing and not loaded.unexpected
    found = "all keys match" if complete else f"missing {loaded.missing[:2]}, unexpected {loaded.unexpected[:2]}"
    yield Check("PEFT: loads in a fresh process", complete and not loaded.knows_package, found)
    works = loaded.finite and loaded.change > 0
    yield Check("PEFT: changes the logits", works, f"by at most {loaded.change:.3g}, finite: {loaded.finite}")


def format_checks(checks: list[Check]) -> str:
    """The checks as text, one per line, with the verdict at the end."""
    failed, unsupported = sum(check.failed for check in checks), [check for check in checks if check.passed is None]
    verdict = "every check passed" if not failed else f"{failed} of {len(checks)} checks FAILED"
    for check in unsupported:
        verdict += f"; not supported by {check.name.partition(':')[0]}"
    return "\n".join([*map(str, checks), verdict])


def re_evaluate(
    model: nn.Module, samples: Mapping[str, list[Sample]], adapter_name: str, with_adapters: Sequence[str] = ()
) -> list[Check]:
    """Compare the losses with the adapter off and on. The check on forget samples passes if their loss rises.

    Args:
        model: carries the adapters.
        samples: set ('forget', 'retain') -> samples.
        adapter_name: the adapter to verify.
        with_adapters: adapters that are on both times, such as the task adapter.
    """
    checks = []
    for name, samples_of_set in samples.items():
        off = float(losses_of(model, samples_of_set, adapters=list(with_adapters)).mean())
        on = float(losses_of(model, samples_of_set, adapters=[*with_adapters, adapter_name]).mean())
        passed = on > off if name == "forget" else math.isfinite(on)
        checks.append(Check(f"re-evaluated: {name} loss", passed, f"{off:.3f} without it, {on:.3f} with it"))
    return checks
