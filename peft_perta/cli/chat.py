r"""Ask the full model, the unlearned one and, if it is given, the retain-only one the same questions, one under the
other. It needs the base model and its adapters; questions come from the terminal or from a pipe, one a line.

Example:
  peft-perta chat --model meta-llama/Llama-3.2-1B-Instruct --adapter task_adapter --adapter unlearn_adapter
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from ..data import visible
from ..errors import ConfigError, DataError
from ..evaluation import Subject, stream
from ..model import adapter_strength, attach_adapters
from ._options import add_model, add_stack, given_adapters, load_model, read_strengths

_RETAIN_ONLY = "retain-only"
_COMMANDS = "/strength X multiplies the last adapter, /off switches it off, /strength 1 on again, /quit ends"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_stack(parser)
    parser.add_argument(
        "--retain-only-adapter", metavar="DIR",
        help="an adapter that never saw the forget rows, to ask it the same (default: none)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=96, help="the most tokens of an answer (default: 96)")


def run(options: argparse.Namespace) -> None:
    """Answer questions until there are no more. Each is asked anew: no answer sees an earlier one."""
    strengths = read_strengths(options.adapters)
    if not strengths:
        raise ConfigError("--adapter: expected the adapters of the stack, the one in question last; found none")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: expected at least 1, found {options.max_new_tokens}")
    beside = given_adapters({_RETAIN_ONLY: options.retain_only_adapter})
    base, tokenizer = load_model(options)
    names = {f"adapter_{number}": directory for number, directory in enumerate(strengths, start=1)}
    model = attach_adapters(base, {**names, **beside})
    factors = dict(zip(names, strengths.values(), strict=True))
    *earlier, last = factors
    stacks = {"full": earlier, "unlearned": [*earlier, last], **{name: [name] for name in beside}}
    print(visible(f"{', '.join(stacks)}. {_COMMANDS}."))
    for line in _lines():
        if line == "/quit":
            return
        if line.startswith("/"):
            factors[last] = _new_strength(line, factors[last])
            continue
        for name, stack in stacks.items():
            print(f"{name}{_suffix(factors[last]) if last in stack else ''}: ", end="", flush=True)
            with ExitStack() as scaled:
                for adapter in set(stack) & set(factors):
                    scaled.enter_context(adapter_strength(model, adapter, factors[adapter]))
                _answer(Subject(model, tokenizer, stack), line, options.max_new_tokens)


def _lines() -> Iterator[str]:
    """The lines of standard input that are not blank. Those that no terminal shows are printed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    while sys.stdin is not None:
        try:
            line = input("> ") if is_terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            if not is_terminal:
                print(visible(f"> {line.strip()}"))
            yield line.strip()


def _new_strength(line: str, strength: float) -> float:
    """The strength after a command, which is told."""
    command, _, text = line.partition(" ")
    try:
        wanted = 0.0 if line == "/off" else float(text) if command == "/strength" else math.nan
    except ValueError:
        wanted = math.nan
    if not math.isfinite(wanted):
        print(visible(f"expected a command, found {line!r}; {_COMMANDS}"))
        return strength
    print(f"the last adapter has strength {wanted:g}")
    return wanted


def _suffix(strength: float) -> str:
    return "" if strength == 1 else " (off)" if strength == 0 else f" (strength {strength:g})"


def _answer(subject: Subject, question: str, max_new_tokens: int) -> None:
    """Print the answer while it is written; what is wrong with the question is told in its place."""
    try:
        row = {"question": question, "answer": "-"}  # the answer is not read
        stream(subject, row, lambda text: print(visible(text), end="", flush=True), max_new_tokens=max_new_tokens)
    except DataError as error:
        print(visible(f"({error})"), end="")
    print()
