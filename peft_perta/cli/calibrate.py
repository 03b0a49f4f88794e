r"""Find the strength at which a negative adapter meets a goal, and write the adapter at that strength. It needs the
base model, an adapter that `peft-perta unlearn` wrote, forget rows, and retain rows that gave no gradients.

Example:
  peft-perta calibrate --model meta-llama/Llama-3.2-1B-Instruct --adapter unlearn_adapter \
      --forget forget.jsonl --retain held_out.jsonl --retain-tolerance 0.1 --output calibrated_adapter
"""

from __future__ import annotations

import argparse

from ..adapters import PROVENANCE_NAME, PerTAProvenance, load_emitted
from ..errors import AdapterError
from ..evaluation import calibrate
from ._goal import add_goal, load_search, search_adapters
from ._options import add_model, add_output, add_served_as, print_next, save_adapter
from ._output import check_output_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_served_as(parser)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="a negative adapter that `peft-perta unlearn` wrote"
    )
    parser.add_argument(
        "--forget-adapter", metavar="DIR",
        help="also draw the strength curve of this forget adapter's plain negation, for comparison",
    )  # fmt: skip
    add_output(parser, "the rescaled adapter")
    add_goal(parser, required=True)


def run(options: argparse.Namespace) -> None:
    """Find the strength, and write the rescaled adapter."""
    check_output_of(options, PROVENANCE_NAME)
    adapters = search_adapters(options, {"unlearn": options.adapter, "forget": options.forget_adapter})
    emitted = load_emitted(options.adapter)
    if not isinstance(emitted.provenance, PerTAProvenance):
        raise AdapterError(
            f"{options.adapter} was not made by unlearn, expected an adapter that was; calibrate the parts of a fused "
            "adapter, and fuse them again"
        )
    model, goal, samples = load_search(options, adapters)
    calibration = calibrate(
        model,
        goal,
        samples["forget"],
        samples["retain"],
        adapter_name="unlearn",
        with_adapters=["task"] if options.task_adapter else [],
        negated_adapter="forget" if options.forget_adapter else None,
        retain_only=["retain-only"] if options.retain_only_adapter else None,
    )
    save_adapter(emitted.scaled(calibration.strength).with_calibration(calibration), options.output)
    print_next(options)
