r"""Estimate the adapter that training would have given without some of its rows, or with other ones, by one influence
step (LLMEraser). It needs the adapter and all rows that it was trained on; the base model's own knowledge stays.

Example:
  peft-perta erase --model meta-llama/Llama-3.2-1B-Instruct --adapter task_adapter --training all.jsonl \
      --forget forget.jsonl --output erased_adapter
"""

from __future__ import annotations

import argparse
from typing import Any

from ..adapters import PROVENANCE_NAME, torch_dtype
from ..data import read_rows
from ..errors import DataError
from ..influence import InfluenceSettings, check_difference, correct_responses, erase_instances, modify_queries
from ..model import attach_adapters, resolve_targets
from ._options import (
    ROWS,
    add_dtype,
    add_forget,
    add_model,
    add_output,
    check_distinct,
    check_rows,
    given_adapters,
    load_model,
    print_next,
    save_adapter,
)
from ._output import check_output_of
from ._settings import add_settings, read_settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the LoRA adapter that was trained on the rows")
    parser.add_argument("--training", required=True, metavar="ROWS", help=f"all rows that it was trained on: {ROWS}")
    section = parser.add_argument_group("what changes", "Give exactly one. All its rows must be training rows.")
    change = section.add_mutually_exclusive_group(required=True)
    add_forget(change, required=False, note="; every copy of them is removed")
    pairs = 'JSON lines of {"old": row, "new": row}'
    change.add_argument("--modify", metavar="PAIRS", help=f"training rows that get another query: {pairs}")
    change.add_argument("--correct", metavar="PAIRS", help=f"training rows that get another completion: {pairs}")
    parser.add_argument(
        "--with-adapter", action="append", default=[], dest="with_adapters", metavar="DIR",
        help="an adapter that was active beside it during training; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--form", choices=["difference", "edited"], default="difference",
        help="write the difference, at twice the rank, to stack on the old adapter; or the edited adapter, to replace "
        "it (default: difference)",
    )  # fmt: skip
    add_dtype(parser, "the factors")
    add_output(parser, "the adapter")
    add_settings(parser, InfluenceSettings, "settings of the method (InfluenceSettings)")


def run(options: argparse.Namespace) -> None:
    """Edit the adapter."""
    settings = read_settings(InfluenceSettings, options)
    check_output_of(options, PROVENANCE_NAME)
    edit, changed = _change(options)
    check_rows(options.training)
    beside = {f"beside_{number}": directory for number, directory in enumerate(options.with_adapters, start=1)}
    adapters = given_adapters({"task": options.adapter, **beside})
    check_distinct(adapters.values())
    base, tokenizer = load_model(options)
    model = attach_adapters(base, adapters)
    if options.form == "difference":
        check_difference(resolve_targets(model, "task"))
    result = edit(
        model, options.training, changed, tokenizer, adapter_name="task", with_adapters=list(beside), settings=settings
    )
    emitted = result.difference if options.form == "difference" else result.edited
    save_adapter(emitted(torch_dtype(options.dtype)), options.output)
    use = "stack it on the old adapter" if options.form == "difference" else "use it in place of the old adapter"
    print_next(options, f", then {use}")


def _change(options: argparse.Namespace) -> tuple[Any, Any]:
    """The function that edits the adapter, and the file of rows, or the pairs, that it takes."""
    if options.forget:
        check_rows(options.forget)
        return erase_instances, options.forget
    if options.modify:
        return modify_queries, _read_pairs(options.modify)
    return correct_responses, _read_pairs(options.correct)


def _read_pairs(path: str) -> list[tuple[dict, dict]]:
    pairs = []
    for number, pair in enumerate(read_rows(path), start=1):
        if not all(isinstance(pair.get(side), dict) for side in ("old", "new")):
            raise DataError(f'{path}, line {number}: expected {{"old": row, "new": row}}, found {pair!r:.120}')
        pairs.append((pair["old"], pair["new"]))
    return pairs
