r"""Write adapters, several fused exactly into one, in the files that a runtime reads, and the commands that serve them.
It needs plain LoRA adapters of one base model, whose weights are not loaded, and for GGUF files the package gguf.

Example:
  peft-perta export task_adapter calibrated_adapter:0.8 --base model.gguf --to gguf --output served
"""

from __future__ import annotations

import argparse

from ..adapters import EXPORT_NAME, EXPORTS, export_adapters, torch_dtype
from ._options import BASE_MODEL, PARTS, add_dtype, add_output, add_rank_of_sum, add_revision, add_table, read_strengths
from ._output import check_output_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help=PARTS)
    parser.add_argument(
        "--base", "--model", dest="model", required=True, metavar="NAME",
        help=f"{BASE_MODEL}, as the runtime will load it; its weights are not loaded",
    )  # fmt: skip
    add_revision(parser)
    parser.add_argument("--to", required=True, choices=EXPORTS, help="the format")
    add_rank_of_sum(parser)
    add_dtype(parser, "the factors")
    add_output(parser, "the files")
    add_table(parser, "formats", EXPORTS)


def run(options: argparse.Namespace) -> None:
    """Write the files."""
    check_output_of(options, EXPORT_NAME)
    record = export_adapters(
        options.model,
        read_strengths(options.adapters),
        EXPORTS[options.to],
        options.output,
        revision=options.revision,
        rank=options.rank,
        dtype=torch_dtype(options.dtype),
    )
    print(f"{record}\nIt is in {options.output}")
