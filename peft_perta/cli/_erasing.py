"""Rows out of an adapter, or changed in it, without training it again: ``erase``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..adapters import DTYPES, PROVENANCE_NAME, save_perta_adapter, torch_dtype
from ..data import check_output, read_rows
from ..errors import DataError
from ..influence import (
    CURVATURES,
    FACTORS,
    SOLVERS,
    InfluenceSettings,
    check_difference,
    correct_responses,
    erase_instances,
    modify_queries,
)
from ..model import attach_adapters, check_adapter_files, resolve_targets
from ._options import ROWS_HELP, add_command, add_model, check_distinct, load_model, seed_of

CHOICES = {"curvature": CURVATURES, "solver": SOLVERS, "factors": FACTORS}


_TYPES = {
    "curvature": str,
    "damping": float,
    "absolute_damping": float,
    "solver": str,
    "tolerance": float,
    "max_iterations": int,
    "curvature_samples": int,
    "factors": str,
    "batch_size": int,
    "max_length": int,
    "seed": seed_of,
}


def add_commands(commands) -> None:
    erase = add_command(
        commands, "erase", _erase, "take rows out of an adapter that was trained on them, or change them (LLMEraser)"
    )
    add_model(erase)
    erase.add_argument("--adapter", required=True, metavar="DIR", help="the LoRA adapter that was trained on the rows")
    erase.add_argument("--training", required=True, metavar="ROWS", help=f"all its training rows: {ROWS_HELP}")
    pairs = 'JSON lines of {"old": row, "new": row}'
    change = erase.add_mutually_exclusive_group(required=True)
    change.add_argument("--erase", metavar="ROWS", help="rows of it that must go, every copy of them")
    change.add_argument("--modify", metavar="PAIRS", help=f"rows of it with another query: {pairs}")
    change.add_argument("--correct", metavar="PAIRS", help="rows of it with another completion, likewise")
    erase.add_argument(
        "--with-adapter", action="append", default=[], metavar="DIR", help="what was on beside it while it was trained"
    )
    erase.add_argument(
        "--form", choices=["difference", "edited"], default="difference",
        help="an adapter to stack on the old one, at twice its rank, or one in its place (default: difference)",
    )  # fmt: skip
    erase.add_argument("--dtype", choices=DTYPES, default="float32", help="of what is emitted (default: float32)")
    erase.add_argument("--output", required=True, metavar="DIR", help="directory of the emitted adapter")
    for field in dataclasses.fields(InfluenceSettings):
        default = "" if field.default is None else f" (default: {field.default})"
        erase.add_argument(
            "--" + field.name.replace("_", "-"), type=_TYPES[field.name], default=field.default,
            choices=CHOICES.get(field.name), help=field.metadata["help"] + default,
        )  # fmt: skip


def _erase(options: argparse.Namespace) -> None:
    fields = dataclasses.fields(InfluenceSettings)
    settings = InfluenceSettings(**{field.name: getattr(options, field.name) for field in fields})
    check_output(options.output, PROVENANCE_NAME)
    function: Any = erase_instances
    if options.erase:
        changed = read_rows(options.erase)
    else:
        function = modify_queries if options.modify else correct_responses
        changed = _read_pairs(options.modify or options.correct)
    training = read_rows(options.training)
    beside = {f"beside_{number}": directory for number, directory in enumerate(options.with_adapter, start=1)}
    for directory in (options.adapter, *beside.values()):
        check_adapter_files(directory)
    check_distinct((options.adapter, *beside.values()))
    base, tokenizer = load_model(options)
    model = attach_adapters(base, {"task": options.adapter, **beside})
    if options.form == "difference":
        check_difference(resolve_targets(model, "task"))
    result = function(
        model, training, changed, tokenizer, adapter_name="task", with_adapters=list(beside), settings=settings
    )
    emitted = result.difference if options.form == "difference" else result.edited
    save_perta_adapter(options.output, *emitted(torch_dtype(options.dtype)))
    print(f"{result.provenance}\nIt is in {options.output}")
    next_to = "stack it on the adapter" if options.form == "difference" else "use it in the adapter's place"
    print(f"Next: peft-perta verify {options.output} --base {options.model}, then {next_to}")


def _read_pairs(path: str) -> list[tuple[dict, dict]]:
    pairs = []
    for number, pair in enumerate(read_rows(path), start=1):
        if not all(isinstance(pair.get(side), dict) for side in ("old", "new")):
            raise DataError(f'{path}, line {number}: expected {{"old": row, "new": row}}, found {pair!r:.120}')
        pairs.append((pair["old"], pair["new"]))
    return pairs
