"""Whole benchmarks, a file each: the rows that they ask, and the log that they leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ...data import check_output, spread, write_file
from ...errors import ConfigError
from ...model import base_name, hash_embeddings, tuner_modules
from ..logs.files import Log, read_log, write_log
from ..logs.rescoring import aggregate, check_retain_only
from ..subject import Subject
from . import choices, muse, rwku, tofu
from .suite import Splits, Suite, SuiteSettings

SUITES: dict[str, Suite] = {"tofu": tofu.SUITE, "muse": muse.SUITE, "choices": choices.SUITE, "rwku": rwku.SUITE}


RECORD_NAME = "evaluation.json"


def read_suites(paths: Mapping[str, str | Path], split: str | None = None) -> dict[str, Splits]:
    """The rows of each suite: suite -> split -> rows.

    Args:
        paths: suite -> the directory or file that it is read from.
        split: the forget set, where a directory holds several ('forget10').

    Raises:
        ConfigError: no suite is given, or one is unknown.
        DataError: a file is missing or malformed.
    """
    if not paths:
        raise ConfigError(f"expected at least one suite to evaluate, found none; the suites are {sorted(SUITES)}")
    for name in paths:
        if name not in SUITES:
            raise ConfigError(f"expected one of the suites {sorted(SUITES)}, found {name!r}")
    return {name: SUITES[name].read(Path(path), split) for name, path in paths.items()}


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suites: Mapping[str, str | Path | Splits],
    *,
    adapters: Sequence[str] | None = None,
    split: str | None = None,
    retain_only_logs: Mapping[str, Log] | None = None,
    retain_only: Subject | None = None,
    rows: int | None = None,
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int = 200,
    output_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Log]:
    """Judge a causal language model, with any stack of adapters on, as the field does; the model goes back as it came.

    Args:
        suites: suite ('tofu', 'muse', 'choices', 'rwku') -> the directory or file of its rows, or its splits.
        adapters: names of those that are on; None: as they are.
        split: the forget set, where a directory holds several ('forget10').
        retain_only_logs: suite -> the log of a retain-only model: forget quality and privleak are measured against it.
        reference: a retain-only model, for the membership attack that needs one.
        rows: at most so many of each split, at even distances; None for all.
        max_length: tokens kept of each row.
        output_dir: where each suite's log is written as it is finished; what is there already of the same model, rows
            and settings is not computed again.

    Returns:
        Suite -> log: metric -> {agg_value, value_by_index}, as open-unlearning lays it out.

    Raises:
        ConfigError: a suite is unknown, or a setting out of its range.
        DataError: rows are missing or malformed; before anything is computed.
        NumericalError: a loss is not finite.
    """
    for name, value in (("rows", rows), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, found {value}")
    subject = Subject(model, tokenizer, adapters, batch_size, max_length, show_progress_bar)
    settings = SuiteSettings(rows, max_new_tokens, retain_only)
    given = {name: path for name, path in suites.items() if isinstance(path, (str, Path))}
    splits = {**suites, **(read_suites(given, split) if given or not suites else {})}
    for name in splits:
        if name not in SUITES:
            raise ConfigError(f"expected one of the suites {sorted(SUITES)}, found {name!r}")
    asked: dict[str, Splits] = {
        name: {key: spread(found, rows) if rows else found for key, found in of.items()}  # type: ignore[union-attr]
        for name, of in splits.items()
    }
    for name, log in (retain_only_logs or {}).items():
        found = asked.get(name, {})
        needed = {"forget_quality": name == "tofu", "privleak": any("holdout" in key for key in found)}
        check_retain_only(log, [metric for metric, used in needed.items() if used and found])
    keys = {name: _key(subject, name, of, settings) for name, of in asked.items()} if output_dir else {}
    record: dict[str, Any] = {}
    if output_dir is not None:
        directory = check_output(output_dir, RECORD_NAME)
        record = _record(directory / RECORD_NAME)
    logs = {}
    for name, of in asked.items():
        suite = SUITES[name]
        path = Path(output_dir) / suite.file_name if output_dir is not None else None
        known = record.get("suites", {})
        if path is not None and known.get(name) == keys[name] and path.is_file():
            log = read_log(path)
        else:
            log = suite.evaluate(subject, of, settings)
        logs[name] = aggregate(log, (retain_only_logs or {}).get(name))
        if path is not None:
            record = {**record, "suites": {key: value for key, value in known.items() if key != name}}
            write_file(path.parent / RECORD_NAME, json.dumps(record, indent=1) + "\n")
            write_log(logs[name], path)
            record["suites"][name] = keys[name]
            write_file(path.parent / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    return logs


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("suites"), dict) else {}


def _key(subject: Subject, name: str, splits: Splits, settings: SuiteSettings) -> str:
    """What a log depends on, as a hash: the model, the adapters that are on, the rows and the settings."""
    digest = hashlib.sha256()
    facts = [name, splits, settings.max_new_tokens, subject.max_length, base_name(subject.model)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    digest.update(hash_embeddings(subject.model).encode())
    for judged in filter(None, (subject, settings.retain_only)):
        digest.update(_hash_stack(judged).encode())
    return digest.hexdigest()


def _hash_stack(subject: Subject) -> str:
    """The weights and scalings of the adapters that are on."""
    digest = hashlib.sha256()
    for name, module in subject.model.named_modules():
        for tuner in tuner_modules([module]):
            on = subject.adapters if subject.adapters is not None else tuner.active_adapters
            scaling = getattr(tuner, "scaling", {})
            digest.update(f"{name} {[(key, scaling.get(key)) for key in on]}".encode())
            for path, part in tuner.named_modules():
                with align_module_device(part):  # an offloaded module has its weights only while it runs
                    for key, parameter in part.named_parameters(path, recurse=False):
                        if set(key.split(".")) & set(on) and not parameter.is_meta:
                            digest.update(key.encode() + parameter.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["SUITES", "Log", "Splits", "Suite", "SuiteSettings", "evaluate", "read_suites"]
