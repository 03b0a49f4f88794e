r"""Merge adapters into a full-precision copy of the base model, shard by shard, so that none can be switched off. It
needs a base model that is not quantised, and plain LoRA adapters of it.

Example:
  peft-perta merge task_adapter calibrated_adapter --model meta-llama/Llama-3.2-1B-Instruct --output merged_model
"""

from __future__ import annotations

import argparse

from ..adapters import MERGED_NAME, compare_merged, merge_adapters, torch_dtype
from ..data import read_rows
from ._options import BASE_MODEL, PARTS, ROWS, add_base_model, add_dtype, add_output, read_strengths
from ._output import check_output_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help=PARTS)
    add_base_model(parser, f"{BASE_MODEL}, which cannot be merged, nor can another quantised one")
    add_dtype(parser, "the merged model", default=None)
    parser.add_argument(
        "--check", metavar="ROWS",
        help="compare answers and losses on these rows with those of the base and its adapters; the status is 1 if "
        f"they differ by more than rounding the merged weights explains: {ROWS}",
    )  # fmt: skip
    add_output(parser, "the merged model")


def run(options: argparse.Namespace) -> int:
    """Write the merged model; the status is 1 if the check finds that it is not the stacked one."""
    check_output_of(options, MERGED_NAME)
    parts = read_strengths(options.adapters)
    rows = read_rows(options.check) if options.check else None
    dtype = torch_dtype(options.dtype) if options.dtype else None
    provenance = merge_adapters(options.model, parts, options.output, dtype=dtype, revision=options.revision)
    print(
        f"{provenance}\nThe model is in {options.output}; it loads without PEFT. If you quantise it, audit what you "
        "serve: rounding to 4 bits can undo the edit (docs/serving.md)"
    )
    if rows is None:
        return 0
    check = compare_merged(options.model, parts, options.output, rows, revision=options.revision)
    options.status = int(not check.agrees)
    print(check)
    return options.status
