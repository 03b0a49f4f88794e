r"""Combine several adapters into one, exactly or truncated to a rank, for servers that take one adapter per request. It
needs plain LoRA adapters of one base model, whose weights are not loaded.

Example:
  peft-perta fuse task_adapter calibrated_adapter:0.8 --model meta-llama/Llama-3.2-1B-Instruct --output one_adapter
"""

from __future__ import annotations

import argparse

from ..adapters import PROVENANCE_NAME, fuse_adapters, torch_dtype
from ..model import attach_adapters, load_skeleton
from ._options import (
    BASE_MODEL,
    PARTS,
    add_base_model,
    add_dtype,
    add_output,
    add_rank_of_sum,
    print_next,
    read_strengths,
    save_adapter,
)
from ._output import check_output_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help=PARTS)
    add_base_model(parser, f"{BASE_MODEL}; its weights are not loaded")
    add_rank_of_sum(parser)
    add_dtype(parser, "the factors")
    add_output(parser, "the fused adapter")


def run(options: argparse.Namespace) -> None:
    """Write the fused adapter."""
    check_output_of(options, PROVENANCE_NAME)
    parts = read_strengths(options.adapters)
    directories = {f"adapter_{number}": directory for number, directory in enumerate(parts, start=1)}
    strengths = {name: parts[directory] for name, directory in directories.items()}
    skeleton = load_skeleton(options.model, revision=options.revision)
    emitted = fuse_adapters(
        attach_adapters(skeleton, directories),
        strengths,
        rank=options.rank,
        dtype=torch_dtype(options.dtype),
        labels=directories,
    )
    save_adapter(emitted, options.output)
    print_next(options, ", then serve it alone")
