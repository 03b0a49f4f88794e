"""Attack results as a table of text."""

from __future__ import annotations

from collections.abc import Sequence

from .attack import AttackResult

_HEADER = ("attack", "setting", "measure", "unlearned", "retain-only", "full")


def format_attacks(results: Sequence[AttackResult]) -> str:
    """A table with one line per measure: the numbers of the unlearned, the retain-only and the full model.

    Below it, one line for each attack that was skipped.
    """
    lines: list[tuple[str, ...]] = [_HEADER]
    attack = ""
    for result in results:
        first = True
        for measure in result.unlearned:
            models = (result.unlearned, result.retain_only, result.full)
            values = (numbers.get(measure) if numbers else None for numbers in models)
            shown = ("-" if value is None else f"{value:.3f}" for value in values)
            names = ("" if result.attack == attack else result.attack, result.setting if first else "", measure)
            lines.append((*names, *shown))
            attack, first = result.attack, False
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*table, *(f"{r.attack} was skipped: {r.skipped}" for r in results if r.skipped)])
