r"""Show rows as the model will see them: with special tokens, with the part that carries loss marked, and how many
tokens there are. It needs the rows, and the base model's tokenizer and config; the model itself is not loaded.

Example:
  peft-perta rows forget.jsonl --model meta-llama/Llama-3.2-1B-Instruct
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ..data import IGNORED, Sample, load_samples, spread, visible
from ..errors import ConfigError
from ..model import load_skeleton, load_tokenizer, row_length
from ._options import ROWS, add_base_model, add_max_length, check_rows
from ._terminal import at_terminal

_MARKS = ("[[", "]]")
_BOLD = ("\x1b[1m", "\x1b[0m")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", metavar="ROWS", help=ROWS)
    add_base_model(parser)
    parser.add_argument("--show", type=int, default=3, metavar="N", help="show N rows, at even distances (default: 3)")
    add_max_length(parser)


def run(options: argparse.Namespace) -> None:
    """Print the rows and the counts."""
    if options.show < 0:
        raise ConfigError(f"--show: expected a number of rows, found {options.show}")
    check_rows(options.source)
    max_length = row_length(load_skeleton(options.model, revision=options.revision), options.max_length)
    tokenizer = load_tokenizer(options.model, revision=options.revision)
    samples = load_samples(options.source, tokenizer, max_length=max_length, name="the rows")
    in_bold = at_terminal() and "NO_COLOR" not in os.environ
    firsts = [next(of_row) for _, of_row in itertools.groupby(samples, lambda sample: sample.row)]
    shown = [_shown(sample, tokenizer, _BOLD if in_bold else _MARKS) for sample in spread(firsts, options.show)]
    legend = "in bold" if in_bold else f"between {' and '.join(_MARKS)}"
    print("\n".join([f"What carries loss is {legend}.\n", *shown] if shown else []))
    print("\n".join(_counts(samples, len(firsts), max_length)))


def _counts(samples: Sequence[Sample], rows: int, max_length: int) -> Iterator[str]:
    """What the samples hold, one line each."""
    tokens = sum(len(sample.input_ids) for sample in samples)
    with_loss = sum(sum(_has_loss(sample)) for sample in samples)
    cut = [sample.left_out for sample in samples if sample.left_out]
    longest = max(len(sample.input_ids) for sample in samples)
    yield f"{'rows':<10}{rows:>12,}"
    yield f"{'samples':<10}{len(samples):>12,}  the longest has {longest:,} tokens"
    yield f"{'tokens':<10}{tokens:>12,}"
    yield f"{'with loss':<10}{with_loss:>12,}"
    yield f"{'cut':<10}{sum(cut):>12,}  tokens of {len(cut):,} rows, at --max-length {max_length:,}"


def _has_loss(sample: Sample) -> list[bool]:
    """[T]; the first token never has: no token before it predicts it."""
    return [False, *(sample.labels[1:] != IGNORED).tolist()]


def _shown(sample: Sample, tokenizer: Any, marks: tuple[str, str]) -> str:
    """The sample's text, with what carries loss between the marks."""
    has_loss = _has_loss(sample)
    parts, stop = [], 0
    for marked, run in itertools.groupby(has_loss):
        start, stop = stop, stop + len(list(run))
        text = visible(_decoded(tokenizer, sample.input_ids.tolist(), start, stop))
        parts.append(f"{marks[0]}{text}{marks[1]}" if marked else text)
    return f"row {sample.row}: {len(has_loss):,} tokens, {sum(has_loss):,} with loss\n{''.join(parts)}\n"


def _decoded(tokenizer: Any, ids: list[int], start: int, stop: int) -> str:
    """The text of some tokens as it stands after those before them: some tokenizers drop a text's first blank."""

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before, text = decode(ids[:start]), decode(ids[:stop])
    return text[len(before) :] if text.startswith(before) else decode(ids[start:stop])
