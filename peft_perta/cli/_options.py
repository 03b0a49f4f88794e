"""Options that several commands share, each described once, and the checks and lines that go with them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import DTYPES, EmittedAdapter
from ..data import DEFAULT, SELF, RowSource, read_rows
from ..errors import ConfigError
from ..evaluation import Calibration
from ..html_report import PICTURE_NAME, draw_calibration
from ..model import SERVED_AS, check_adapter_files, find_adapter, hash_factors, load_base, load_served

HTML_REPORT_NAME = "report.html"
BASE_MODEL = "the base model: a name on the Hugging Face Hub, a directory or a GGUF file"
ROWS = (
    "{question, answer}, {prompt, completion}, {messages} or {text}, in a file (JSON lines, JSON, CSV, Parquet, text), "
    "a directory, or ORG/NAME:CONFIG[SPLIT] on the Hugging Face Hub"
)
ROWS_METAVAR = "ROWS"  # of every option that names a set of rows
PARTS = (
    "a plain LoRA adapter of the base model, as a directory or a name on the Hugging Face Hub, and the strength to "
    "multiply it by (default: 1)"
)


# Options


def add_base_model(parser: argparse.ArgumentParser, text: str = BASE_MODEL) -> None:
    """``--model``, with its help, and ``--revision``."""
    parser.add_argument("--model", required=True, metavar="NAME", help=text)
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """``--revision``."""
    parser.add_argument("--revision", help="the revision of a base model on the Hub")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of ``load_model``."""
    add_base_model(parser)
    add_four_bit(parser)
    parser.add_argument(
        "--device-map", choices=["auto"],
        help="spread the layers over all GPUs, and the rest over the host's memory (default: one GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--safetensors-only", action=argparse.BooleanOptionalAction, default=True,
        help="refuse a base whose weights are in a pickle, pytorch_model.bin (default: True)",
    )  # fmt: skip


def add_four_bit(parser: argparse.ArgumentParser) -> None:
    """``--four-bit``."""
    parser.add_argument("--four-bit", action="store_true", help="quantise the base model to 4-bit NF4 (QLoRA)")


def add_served_as(parser: argparse.ArgumentParser) -> None:
    """``--served-as``, of the commands that search for a strength."""
    parser.add_argument(
        "--served-as", metavar="FORM",
        help=f"measure every loss on the base in the form in which it will be served: {SERVED_AS} (default: as --model "
        "and --four-bit load it)",
    )  # fmt: skip


def add_forget(parser: Any, *, required: bool = True, note: str = "") -> None:
    """``--forget``."""
    parser.add_argument("--forget", required=required, metavar=ROWS_METAVAR, help=f"the forget rows: {ROWS}{note}")


def add_retain(parser: Any, *, required: bool = True, note: str = "") -> None:
    """``--retain``."""
    text = f"the retain rows, in the same formats, or 'default', the general rows that ship{note}"
    parser.add_argument("--retain", required=required, metavar=ROWS_METAVAR, help=text)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """``--columns``, where an option names a set of rows."""
    if any(action.metavar == ROWS_METAVAR for action in parser._actions):
        parser.add_argument(
            "--columns", metavar="OURS=THEIRS,...",
            help="the columns to read, such as question=prompt,answer=response, in every set of rows that names none "
            "of its own, as 'ROWS?question=prompt' does (default: those of the same names)",
        )  # fmt: skip


def name_columns(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Write ``--columns`` behind every set of rows."""
    if getattr(options, "columns", None):
        for action in parser._actions:
            source = getattr(options, action.dest, None)
            if action.metavar != ROWS_METAVAR or not source or source in (DEFAULT, SELF):
                continue
            if not RowSource.of(source).columns:
                setattr(options, action.dest, f"{source}?{options.columns}")


def add_stack(parser: argparse.ArgumentParser) -> None:
    """``--adapter``, once for each adapter of a stack."""
    parser.add_argument(
        "--adapter", action="append", default=[], dest="adapters", metavar="DIR[:STRENGTH]",
        help="an adapter of the stack, and the strength to multiply it by (default: 1); give one option for each, the "
        "negative adapter last",
    )  # fmt: skip


def add_judging(parser: argparse.ArgumentParser, *, rows: str, max_new_tokens: int) -> None:
    """``--rows``, with its help, ``--batch-size``, ``--max-length`` and ``--max-new-tokens``."""
    parser.add_argument("--rows", type=int, help=f"{rows} (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="the most rows per forward pass (default: 32)")
    add_max_length(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens,
        help=f"the most tokens of an answer (default: {max_new_tokens})",
    )  # fmt: skip


def add_task_adapter(parser: Any) -> None:
    """``--task-adapter``."""
    text = "the task adapter, if the full model is the base with an adapter that knows too much"
    parser.add_argument("--task-adapter", metavar="DIR", help=text)


def add_output(parser: argparse.ArgumentParser, content: str) -> None:
    """``--output``, a directory."""
    parser.add_argument("--output", required=True, metavar="DIR", help=f"the directory to write {content} to")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """``--overwrite``, where a command writes a file by the user's name."""
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")


def add_max_length(parser: argparse.ArgumentParser) -> None:
    """``--max-length``."""
    text = "the most tokens per row (default: 1024, or the model's number of positions if that is less)"
    parser.add_argument("--max-length", type=int, help=text)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """``--seed`` of a training run."""
    text = "the seed of the adapter's initialisation and of the order of the rows (default: 0)"
    parser.add_argument("--seed", type=_seed, default=0, help=text)


def add_dtype(parser: argparse.ArgumentParser, content: str, default: str | None = "float32") -> None:
    """``--dtype``; with the default None, that of the base model's files."""
    text = f"the data type of {content} (default: {default or 'that of the base model'})"
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=text)


def add_rank_of_sum(parser: argparse.ArgumentParser) -> None:
    """``--rank`` of a sum of adapters."""
    text = "truncate to this rank (default: the sum of the ranks, which is exact)"
    parser.add_argument("--rank", type=int, help=text)


def add_table(parser: argparse.ArgumentParser, title: str, table: Mapping[str, Any]) -> None:
    """A section of the help that describes each row of a table."""
    parser.add_argument_group(title, described(table))


def described(table: Mapping[str, Any]) -> str:
    """The names of a table's rows, a line each, with their descriptions."""
    width = max(map(len, table))
    return "\n".join(f"{name:<{width}}  {row.description}" for name, row in table.items())


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):  # the range of NumPy's generator
        raise argparse.ArgumentTypeError(f"expected an int from 0 to {2**32 - 1}, found {text!r}")
    return int(text)


# Values


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base model and its tokenizer; as it will be served, where an option says how.

    Raises:
        ConfigError: the model cannot be loaded, or --four-bit and --served-as are both given.
    """
    served_as = getattr(options, "served_as", None)
    if served_as is not None:
        if options.four_bit:
            raise ConfigError(
                f"--four-bit: expected none with --served-as {served_as}, which says the form; leave one of the two out"
            )
        return load_served(
            options.model,
            served_as,
            revision=options.revision,
            device_map=options.device_map,
            safetensors_only=options.safetensors_only,
        )
    return load_base(
        options.model,
        four_bit=options.four_bit,
        revision=options.revision,
        device_map=options.device_map,
        safetensors_only=options.safetensors_only,
    )


def check_rows(*paths: str | None) -> None:
    """Read each given file of rows: a bad one is refused before a model is loaded. The library reads it again, and its
    messages name the file.

    Raises:
        DataError: a file is missing, empty or malformed.
    """
    for path in filter(None, paths):
        read_rows(path)


def flag(name: str) -> str:
    """The option that sets the attribute ``name``."""
    return "--" + name.replace("_", "-")


def given_adapters(directories: Mapping[str, str | None]) -> dict[str, str]:
    """The adapters that are given, by name; their files are checked before a model is loaded.

    Raises:
        AdapterError: a directory holds no plain LoRA adapter, or a damaged or pickled one.
    """
    given = {name: directory for name, directory in directories.items() if directory}
    for directory in given.values():
        check_adapter_files(directory)
    return given


def check_distinct(directories: Iterable[str]) -> None:
    """Check that no adapter is given twice, under whatever names: its delta would be added twice.

    Raises:
        ConfigError: two of the directories hold the same factors.
    """
    seen: dict[str, str] = {}
    for directory in directories:
        factors = hash_factors(find_adapter(directory))
        if factors in seen:
            raise ConfigError(
                f"{directory} is given twice, expected each adapter once: it holds the factors of {seen[factors]}, and "
                "its delta would be added twice"
            )
        seen[factors] = directory


def read_strengths(texts: Sequence[str]) -> dict[str, float]:
    """DIR[:STRENGTH] -> strength, by directory.

    Raises:
        ConfigError: a strength is no finite number, or a directory is given twice.
        AdapterError: a directory holds no plain LoRA adapter, or a damaged or pickled one.
    """
    strengths: dict[str, float] = {}
    for text in texts:
        directory, colon, strength = text.rpartition(":")
        if not colon or os.path.isdir(text):
            directory, strength = text, "1"
        try:
            value = float(strength)
        except ValueError:
            raise ConfigError(f"expected DIR or DIR:STRENGTH with a number, found {text!r}") from None
        if directory in strengths:
            raise ConfigError(f"{directory} is given twice, expected each adapter once")
        if not math.isfinite(value):
            raise ConfigError(f"{directory} has the strength {value}, expected a finite one")
        strengths[directory] = value
    for directory in strengths:
        check_adapter_files(directory)
    check_distinct(strengths)
    return strengths


# Results


def save_adapter(emitted: EmittedAdapter, output: str) -> None:
    """Write the adapter, with the strength curve if its strength was searched for, and print what it is."""
    emitted.save(output)
    print(f"{emitted.provenance}\nIt is in {output}")
    calibration: Calibration | None = getattr(emitted.provenance, "calibration", None)
    if calibration is not None:
        picture = Path(output) / PICTURE_NAME
        draw_calibration(calibration, picture)
        print(f"{calibration}\nThe strength curve is in {picture}")


def print_next(options: argparse.Namespace, then: str = "") -> None:
    """Print the command that checks the adapter in ``options.output``, and what to do ``then``."""
    print(f"Next: peft-perta verify {options.output} --base {options.model}{then}")
