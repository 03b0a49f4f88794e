"""``peft-perta``: parse, call, print. Exit status 0; 1 where ``verify`` finds a fault; 2, with one clear
line, where the input is at fault."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence

from ..errors import PerTAError
from ..model import distributed, quiet
from . import _erasing, _judging, _shipping, _training, _unlearning


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.line = shlex.join(["peft-perta", *(sys.argv[1:] if arguments is None else arguments)])
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our bars shows something else, and goes on
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status or 0
    except PerTAError as error:
        if distributed.local_rank() == 0:  # the others fail with it
            print(f"peft-perta: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        begun = options.begun is not None and os.path.exists(options.begun(options))
        left = "the same command goes on from here" if begun else "nothing was written"
        print(f"peft-perta: interrupted; {left}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-perta",
        description="Take knowledge out of a language model with a LoRA adapter: train a forget adapter on what must "
        "go, weigh it parameter by parameter, and get a negative adapter that stacks on the full model.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for group in (_unlearning, _training, _erasing, _judging, _shipping):
        group.add_commands(commands)
    return parser
