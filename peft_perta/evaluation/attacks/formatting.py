"""Results as text."""

from __future__ import annotations

from collections.abc import Sequence

from .attack import AttackResult

_HEADER = ("attack", "setting", "measure", "unlearned", "retain-only", "full")


def format_attacks(results: Sequence[AttackResult]) -> str:
    """A table: a line a measure, the unlearned model's number beside the retain-only and the full model's."""
    lines: list[tuple[str, ...]] = [_HEADER]
    attack = ""
    for result in results:
        first = True
        for measure in result.unlearned:
            numbers = (found and found.get(measure) for found in (result.unlearned, result.retain_only, result.full))
            shown = ("-" if number is None else f"{number:.3f}" for number in numbers)
            names = ("" if result.attack == attack else result.attack, result.setting if first else "", measure)
            lines.append((*names, *shown))
            attack, first = result.attack, False
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
