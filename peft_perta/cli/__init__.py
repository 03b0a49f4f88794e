"""The command line: ``peft-perta COMMAND``. Each command parses its options, calls the library and prints.

Imports from: every room above.

Each command is a module of its own name under one contract, and a row in ``COMMANDS``:

- its docstring is the help: two sentences on what the command does and what it needs, then an example;
- ``add_options(parser)`` adds its options;
- ``run(options)`` runs it, and returns the exit status if it is not 0; a verdict is in ``options.status`` before it is
  printed;
- ``resume_path(options)``, where an interrupted run can be resumed, is a path that exists once there is work to resume.

Exit statuses: 0; 1 if ``run`` misses its goal, ``verify`` or ``ledger check`` finds a fault, or ``merge --check``
another model than the stack; 2, with one line on standard error, if the input is at fault; 3, with one line that names
a file with the traceback, if something else is; 130 if the run is interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from inspect import cleandoc  # not the module, whose name is a command's
from typing import Any

from ..errors import PerTAError

COMMANDS = {  # name of the command and of its module -> summary
    "demo": "run the whole method on TOFU, with a small Llama that ships with the package",
    "rows": "show rows as the model will see them, and count their tokens",
    "forget": "train a forget adapter on the forget rows",
    "run": "do the whole job: forget, judge, and say what it cost",
    "unlearn": "make a negative adapter from a forget adapter, forget rows and retain rows",
    "calibrate": "rescale a negative adapter to the strength that meets a goal",
    "refine": "weigh an adapter along the input directions of its layers, to keep more",
    "extrapolate": "go further in the direction of an unlearning run (UIPE)",
    "train": "train an adapter to forget some rows and to keep others (NPO, RMU, PCGrad, SAGO, ...)",
    "erase": "remove or change training rows of an adapter without training it again (LLMEraser)",
    "evaluate": "measure what a model with a stack of adapters still knows, and attack it",
    "audit": "say whether the forget rows are gone as if never learned, or only suppressed",
    "chat": "ask the full, the unlearned and the retain-only model the same questions",
    "rescore": "recompute the aggregates of an evaluation log",
    "compare": "run many unlearning methods on one setup, at matched forgetting",
    "fuse": "combine several adapters into one, for servers that take one per request",
    "ledger": "keep the record of requests to forget, and make one adapter of those that are open",
    "merge": "merge adapters into a full-precision copy of the base model",
    "export": "write adapters in the files that llama.cpp, Ollama, mlx-lm, vLLM or PEFT read",
    "push": "upload an adapter to the Hugging Face Hub, privately",
    "verify": "check an adapter's files, what servers require of them, and its base model",
    "inspect": "show what an adapter is and how it was made",
}

_REFUSALS = {  # of the operating system -> what to do
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space and run this again",
    errno.EDQUOT: "free some space and run this again",
    errno.EFBIG: "write to a file system, or under a limit, that takes larger files",
    errno.EROFS: "choose another place",
    errno.EACCES: "give yourself the permission, or choose another file",
    errno.EPERM: "give yourself the permission, or choose another file",
    errno.ELOOP: "mend the link, or choose another file",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its options; by default those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        os.getcwd()
    except OSError as error:  # torch cannot even be imported then
        print(f"peft-perta: error: the working directory is gone ({error}); change to another one", file=sys.stderr)
        return 2
    name = _command_name(arguments)
    resume_path: str | None = None
    options = argparse.Namespace()
    try:
        command = _import(f"cli.{name}")
        parser = command_parser(name)
        options = parser.parse_args(arguments[1:])
        _import("cli._options").name_columns(parser, options)
        options.command_line = shlex.join(["peft-perta", *arguments])
        if hasattr(command, "resume_path"):
            resume_path = command.resume_path(options)
        _import("model").quiet()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the characters of a bar chart shows "?"
        options.status = command.run(options) or 0
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
        return options.status
    except PerTAError as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        if not rank.isdecimal() or int(rank) == 0:  # every process fails with the same error
            print(f"peft-perta: error: {_import('data').visible(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        _discard_output()
        return getattr(options, "status", 0)  # a verdict stands, whether it was read or not
    except KeyboardInterrupt:
        resumable = resume_path is not None and os.path.exists(resume_path)
        remedy = "run the same command again to resume" if resumable else "nothing was written"
        print(f"peft-perta: interrupted; {remedy}", file=sys.stderr)
        return 130
    except Exception as error:
        return _fail(error, getattr(options, "status", None))


def _fail(error: Exception, status: int | None) -> int:
    """Print the line of an error that is not ours; the exit status. ``status`` is that of a command that ended."""
    if isinstance(error, OSError) and status is not None:  # only what is printed was left to write
        print(f"peft-perta: error: standard output could not be written: {error}", file=sys.stderr)
        _discard_output()
        return status or 2
    refusal = _refusal_of(error)
    print(f"peft-perta: error: {refusal}" if refusal else _report_of(error), file=sys.stderr)
    return 2 if refusal else 3


def _discard_output() -> None:
    """Let go what is still to be printed: Python would try again at its end, and fail."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refusal_of(error: Exception) -> str:
    """What the machine refused, in one line; empty if the error is of another kind."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        where = f"{error.filename}: " if error.filename else ""
        return _import("data").visible(f"{where}{error.strerror}; {_REFUSALS[error.errno]}")
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text[:200]}); take smaller batches or rows, --four-bit, or a smaller rank"
    return ""


def _report_of(error: Exception) -> str:
    """Keep the traceback of an error that is not ours; the line that says where it is."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="peft-perta-", suffix=".log", delete=False
    ) as log:
        log.write(f"{shlex.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    reason = _import("data").visible(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
    return f"peft-perta: error: {reason} (not foreseen; the traceback is in {log.name}: please report it)"


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with the docstring of its module as help."""
    command = _import(f"cli.{name}")
    sentences, _, example = cleandoc(command.__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"peft-perta {name}",
        description=textwrap.fill(sentences, shutil.get_terminal_size().columns - 2),
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    _import("cli._options").add_columns(parser)
    return parser


def _command_name(arguments: Sequence[str]) -> str:
    """The command that the first argument names. ``--help`` and errors leave from here, without importing torch."""
    parser = argparse.ArgumentParser(
        prog="peft-perta",
        description="Take knowledge out of a language model with a LoRA adapter: train a forget adapter on the rows to "
        "forget, weight it parameter by parameter, and get a negative adapter that stacks on the full model.",
        epilog="peft-perta COMMAND --help explains a command.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    first = arguments[0] if arguments else ""
    nearest = difflib.get_close_matches(first, COMMANDS, n=1)
    if nearest and first not in COMMANDS:
        parser.error(f"argument COMMAND: invalid choice: {first!r}; did you mean {nearest[0]!r}?")
    return parser.parse_args(arguments[:1]).command


def _import(module: str) -> Any:
    """A module of this package, imported when it is needed: what it imports (torch, trl, ...) takes seconds."""
    return importlib.import_module(f"..{module}", __package__)
