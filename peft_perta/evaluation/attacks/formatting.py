"""Attack results as a table of text."""

from __future__ import annotations

from collections.abc import Sequence

from .attack import AttackResult

_HEADER = ("attack", "setting", "measure", "unlearned", "retain-only", "full")


def format_attacks(results: Sequence[AttackResult]) -> str:
    """The table of ``attack_cells``, and below it the lines of ``skipped_attacks``."""
    lines = attack_cells(results)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*table, *skipped_attacks(results)])


def attack_cells(results: Sequence[AttackResult]) -> list[tuple[str, ...]]:
    """Below a header, one line per measure: the numbers of the unlearned, the retain-only and the full model."""
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
    return lines


def skipped_attacks(results: Sequence[AttackResult]) -> list[str]:
    """One line for each attack that was skipped, with the reason."""
    return [f"{result.attack} was skipped: {result.skipped}" for result in results if result.skipped]
