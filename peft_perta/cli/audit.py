"""Attack an unlearned model in every way, and say whether the forget rows are gone as if never learned or suppressed.
It needs the base model, the adapters in their order, both sets of rows, and a retain-only adapter or a task adapter.

Example:
  peft-perta audit --model M --adapter task_adapter --adapter unlearn_adapter --forget forget.jsonl \
      --retain held_out.jsonl --retain-only-adapter retain_adapter --output audit
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack

from ..adapters import add_audit, read_card
from ..comparison import PROSE
from ..data import claimed_directory, read_rows, write_file
from ..errors import ConfigError
from ..evaluation import AUDIT_RECORD_NAME, AttackSettings, Audit, Subject, Victims, audit
from ..html_report import AUDIT_PAGE_NAME, write_audit_page
from ..model import adapter_strength, attach_adapters, check_adapter_files, find_adapter, hash_factors
from ._options import (
    add_forget,
    add_judging,
    add_model,
    add_output,
    add_retain,
    add_stack,
    load_model,
    read_strengths,
)
from ._output import check_output_of
from ._terminal import marked, show, table

RESULT_NAME = "audit.json"
_YARDSTICK = "retain-only"
_SHARE = "share of what was known: 0 never learned, 1 as before"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    add_stack(parser)
    add_forget(parser)
    add_retain(parser, note="; rows that no method used")
    parser.add_argument(
        "--retain-only-adapter", metavar="DIR",
        help="an adapter that never saw the forget rows: the yardstick of 'never learned' (default: the base with "
        "every adapter off, where more than one adapter is given)",
    )  # fmt: skip
    parser.add_argument(
        "--never-seen", metavar="ROWS",
        help="rows of the forget rows' kind that no model saw: can the two be told apart? (default: not asked)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, metavar="MINUTES", help="begin no attack after that time (default: no limit)"
    )
    parser.add_argument(
        "--beside", metavar="DIR",
        help="the output of an audit of another adapter, for the same models, rows and settings: what it measured of "
        "the full and the retain-only model is taken from there (default: measured anew)",
    )  # fmt: skip
    parser.add_argument(
        "--model-card", action="store_true",
        help="write the verdict into the model card of the last adapter too (default: not)",
    )  # fmt: skip
    add_judging(parser, rows="the most forget rows, at even distances", max_new_tokens=96)
    add_output(parser, "audit.json, audit.html and the record of the attacks")


def run(options: argparse.Namespace) -> int:
    """Print the verdict and the evidence, and write the page."""
    output = check_output_of(options, AUDIT_RECORD_NAME, grows=True)
    strengths = read_strengths(options.adapters)
    forget, retain = read_rows(options.forget), read_rows(options.retain)
    never_seen = read_rows(options.never_seen) if options.never_seen else []
    if not strengths:
        raise ConfigError("--adapter: expected the adapters of the stack, the one in question last; found none")
    if len(strengths) == 1 and not options.retain_only_adapter:
        raise ConfigError(
            "an audit needs a yardstick of 'never learned': expected --retain-only-adapter, or a task adapter before "
            "the adapter in question (the base alone is the yardstick then); found neither"
        )
    adapter, strength = list(strengths.items())[-1]
    if options.model_card:
        if strength != 1:
            raise ConfigError(
                f"--model-card: expected the last adapter at strength 1, as its card describes it, found {strength:g}; "
                "make an adapter of that strength by `peft-perta calibrate` or `peft-perta fuse`"
            )
        read_card(adapter)
    count = min(len(forget), options.rows or len(forget))
    settings = AttackSettings(
        relearning_rows=tuple(sorted({1, min(10, max(count // 2, 1))})),
        rows=options.rows,
        max_new_tokens=options.max_new_tokens,
    )
    adapters = {f"adapter_{number}": directory for number, directory in enumerate(strengths, start=1)}
    stack = list(adapters)
    if options.retain_only_adapter:
        check_adapter_files(options.retain_only_adapter)
        adapters[_YARDSTICK] = options.retain_only_adapter
    model, tokenizer = load_model(options)
    model = attach_adapters(model, adapters)
    yardstick = [_YARDSTICK] if options.retain_only_adapter else []

    def subject(names: list[str]) -> Subject:
        return Subject(model, tokenizer, names, options.batch_size, options.max_length)

    unrelated = read_rows(PROSE)
    victims = Victims(subject(stack), subject(stack[:-1]), subject(yardstick), forget, retain, unrelated, never_seen)
    with claimed_directory(output, AUDIT_RECORD_NAME, "{}\n"), ExitStack() as scaled:
        for name, strength in zip(stack, strengths.values(), strict=True):
            scaled.enter_context(adapter_strength(model, name, strength))
        found = audit(
            victims, yardstick=_YARDSTICK if yardstick else "origin", settings=settings,
            minutes=options.minutes, output_dir=output, beside=options.beside,
        )  # fmt: skip
    factors = [hash_factors(find_adapter(directory)) for directory in strengths]  # paths may come to mean others
    result = {"model": options.model, "adapters": strengths, "factors": factors, **found.to_dict()}
    write_file(output / RESULT_NAME, json.dumps(result, indent=1) + "\n")
    write_audit_page(found, options.model, list(strengths), output / AUDIT_PAGE_NAME)
    if options.model_card:
        add_audit(adapter, found)
    _show(found)
    print(f"The evidence is in {output / RESULT_NAME}, the page in {output / AUDIT_PAGE_NAME}")
    if found.not_tried:
        print(f"Not tried, for want of time: {', '.join(found.not_tried)}; the same command without --minutes goes on")
    return 0


def resume_path(options: argparse.Namespace) -> str:
    """The record of the attacks that are made."""
    return os.path.join(options.output, AUDIT_RECORD_NAME)


def _show(found: Audit) -> None:
    """Print the evidence as a table, what was skipped and what was kept, and the verdict."""
    evidence = [(piece.name, str(piece.share) if piece.share else "the rows cannot tell") for piece in found.evidence]
    others = "\n".join(_others(found))
    show(f"{_text(evidence)}\n{others}", table(["", _SHARE], evidence, texts=2), marked(others))


def _text(evidence: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in evidence)
    return "\n".join([f"{_SHARE:<{width}}", *(f"{name:<{width}}  {share}" for name, share in evidence)])


def _others(found: Audit) -> list[str]:
    skipped = [f"{result.attack} was skipped: {result.skipped}" for result in found.results if result.skipped]
    kept = [f"kept of the retain rows' probability ({role}): {interval}" for role, interval in found.kept.items()]
    return [
        *skipped,
        *kept,
        *([str(found.never_seen)] if found.never_seen else []),
        f"Verdict, on {found.rows} rows, against the {found.yardstick} model: {found.verdict}",
    ]
