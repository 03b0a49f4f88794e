"""Verify an emitted adapter: its files are intact, the servers accept it, and it fits the base. One line per check."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..data import Sample
from ..errors import AdapterError
from ..evaluation import losses_of
from ..model import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    compare_bases,
    compare_names,
    hash_file,
    identify_base_files,
    load_skeleton,
    recorded_base,
)
from ._fresh_process import FreshLoad, load_afresh
from ._server_rules import CONFIG_RULES, TENSOR_RULES, Config, Tensors
from .emitted import PROVENANCE_NAME, load_provenance


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what is checked, and for which servers.
        passed: whether the adapter passes.
        found: what was found.
    """

    name: str
    passed: bool
    found: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL':<6}{self.name:<34}{self.found}"


def verify_adapter(directory: str | Path, base: str | None = None, *, revision: str | None = None) -> list[Check]:
    """Check an emitted adapter directory.

    Args:
        directory: a directory that ``save_perta_adapter`` wrote.
        base: the base model, as a directory or a hub name. With it, the adapter is also loaded on the base in a fresh
            process, on the CPU, with PEFT and transformers alone.
        revision: revision of a hub model.

    Returns:
        The checks, passed or failed; a damaged or missing file is a failed check.

    Raises:
        AdapterError: the directory does not exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterError(f"{directory} is no directory; expected one that peft_perta wrote")
    config, tensors = _read(directory)
    checks = [*_file_checks(directory), *_server_checks(config, tensors)]
    if base is not None:
        layer_checks = list(_layer_checks(config, tensors, base, revision))
        loaded = load_afresh(directory, base, revision)
        checks += [*_base_checks(directory, config, base, revision, loaded), *layer_checks, *_load_checks(loaded)]
    return checks


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
        config = json.loads((directory / CONFIG_NAME).read_text())
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


def _base_checks(
    directory: Path, config: Config, base: str, revision: str | None, loaded: FreshLoad | str
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
    skeleton = load_skeleton(base, revision=revision)
    projections = set(config.get("target_modules") or ())
    expected = {
        name
        for name, module in skeleton.named_modules()
        if name.rpartition(".")[2] in projections and getattr(module, "weight", None) is not None
    }
    suffix = ".lora_A.weight"
    adapted = {key.removeprefix("base_model.model.").removesuffix(suffix) for key in tensors if key.endswith(suffix)}
    absent = sorted(expected - adapted)
    found = f"{absent[0]} is missing" if absent else f"{len(expected)} layers, zeros where nothing changes"
    yield Check("TGI: every layer of each projection", not absent, found)


def _load_checks(loaded: FreshLoad | str) -> Iterator[Check]:
    if isinstance(loaded, str):
        yield Check("PEFT: loads in a fresh process", False, loaded)
        return
    complete = not loaded.missing and not loaded.unexpected
    found = "all keys match" if complete else f"missing {loaded.missing[:2]}, unexpected {loaded.unexpected[:2]}"
    yield Check("PEFT: loads in a fresh process", complete and not loaded.knows_package, found)
    works = loaded.finite and loaded.change > 0
    yield Check("PEFT: changes the logits", works, f"by at most {loaded.change:.3g}, finite: {loaded.finite}")


def format_checks(checks: list[Check]) -> str:
    """The checks as text, one per line, with the verdict at the end."""
    failed = sum(not check.passed for check in checks)
    verdict = "every check passed" if not failed else f"{failed} of {len(checks)} checks FAILED"
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
