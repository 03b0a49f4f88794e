"""The demo: train a forget adapter, emit negative adapters, match their forgetting, evaluate every model.

Nothing is precomputed except the three shipped inputs: the base, the task adapter, and the retain-only adapter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import EmittedAdapter
from ..data import check_output, replaced_directory
from ..evaluation import Match, SplitScores, Subject, evaluate_split
from ..perta import PerTAConfig, get_perta_state_dict
from ._demo_picture import draw_trade_off
from .bench import Bench, Stack, timed
from .settings import DemoSettings
from .testbed import SPLITS, Testbed

REPORT_NAME = "report.json"
PICTURE_NAME = "trade_off.png"
EDITS = {"negation": "uniform", "perta-grad": "grad"}  # adapter name -> weighting
BEST = "perta-grad"  # the edit whose adapter is written

LABELS = {
    "negation": "plain negation",
    "perta-grad": "PerTA-grad",
    "task": "full model",
    "retain-only": "retain-only model",
}

_TOLERANCE = 0.01  # of the matched forget loss, relative


@dataclass
class DemoResult:
    """Every figure of the demo.

    Attributes:
        table: (label, strength or None, split -> scores) of each model.
        matches: edit -> its match, and every strength that the search tried.
        curves: edit -> losses along its strength.
        points: 'task' and 'retain-only' -> losses of the full and of the retain-only model.
        seconds: stage -> wall time.
    """

    table: list[tuple[str, float | None, dict[str, SplitScores]]] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    points: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, as ``report.json`` holds them."""
        return {
            "table": [
                {"model": label, "strength": strength, **{name: s.to_dict() for name, s in scores.items()}}
                for label, strength, scores in self.table
            ],
            "matched_forgetting": {name: dataclasses.asdict(match) for name, match in self.matches.items()},
            "curves": self.curves,
            "points": self.points,
            "seconds": self.seconds,
        }


def run_demo(
    output_dir: str | Path,
    *,
    four_bit: bool = False,
    settings: DemoSettings | None = None,
    testbed: Testbed | None = None,
) -> DemoResult:
    """Run the demo and write ``adapter/``, ``report.json`` and ``trade_off.png`` into ``output_dir``.

    Args:
        output_dir: an empty or missing directory, or one of an earlier demo, which is replaced.
        four_bit: quantise the base to NF4.
        settings: sizes of the demo.
        testbed: the model and its rows; by default the shipped ones.

    Raises:
        OutputError: the directory is not ours to write.
    """
    settings = settings or DemoSettings()
    output_dir = Path(output_dir)
    check_output(output_dir, REPORT_NAME)
    result = DemoResult()
    print(f"1. train the forget adapter ({settings.epochs} epochs, rank {settings.rank})")
    with timed(result.seconds, "train the forget adapter"):
        bench = Bench(settings, four_bit=four_bit, testbed=testbed)
    print("2. gradients, weights and factors; emit a negative adapter for each of two weightings")
    emitted = _emit(bench, result)
    print("3. find the strength at which each edit forgets as much as the retain-only model never knew")
    _match(bench, settings, result)
    print("4. evaluate every model")
    _evaluate(bench, settings, result)
    with replaced_directory(output_dir, REPORT_NAME) as directory:
        emitted[BEST].scaled(result.matches[BEST].strength).save(directory / "adapter")
        (directory / REPORT_NAME).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        draw_trade_off(result.curves, result.points, LABELS, directory / PICTURE_NAME)
    print(format_table(result))
    print(
        f"\n{LABELS[BEST]} at matched forgetting is in {output_dir / 'adapter'}; the figures are in "
        f"{output_dir / REPORT_NAME}, the trade-off in {output_dir / PICTURE_NAME}.\n"
        f"Next: peft-perta inspect {output_dir / 'adapter'}"
    )
    return result


def format_table(result: DemoResult) -> str:
    """The table as text: for each model and split its loss, the answers' probability, ROUGE-L and truth score."""
    head = f"{'model':<24}{'strength':>9}" + "".join(f"  |{name:^29}" for name in SPLITS)
    second = f"{'':<33}" + f"  |{'loss':>7}{'prob':>7}{'ROUGE-L':>8}{'truth':>7}" * len(SPLITS)
    lines = ["", head, second, "-" * len(second)]
    for label, strength, scores in result.table:
        shown = "" if strength is None else f"{strength:.2f}"
        line = f"{label:<24}{shown:>9}"
        for name in SPLITS:
            s = scores[name]
            line += f"  |{s.loss:>7.2f}{s.probability:>7.3f}{_shown(s.rouge_l_recall):>8}{_shown(s.truth_score):>7}"
        lines.append(line)
    lines.append(
        "truth: on forget rows, 1 means that true and false answers look alike; elsewhere, higher means that the true "
        "answer is preferred.\n"
        "Each edit is shown at strength 1 (losses and probabilities alone) and at matched forgetting, where its forget "
        "loss is the retain-only model's."
    )
    return "\n".join(lines)


def _emit(bench: Bench, result: DemoResult) -> dict[str, EmittedAdapter]:
    """Emit each edit's negative adapter, and put it on the model under the edit's name."""
    emitted = {}
    for edit, weighting in EDITS.items():
        with timed(result.seconds, f"emit {LABELS[edit]}"):
            config = PerTAConfig(weighting=weighting, seed=bench.settings.seed)
            rows = () if weighting == "uniform" else (bench.setup.forget_rows, bench.setup.retain_rows)
            emitted[edit] = get_perta_state_dict(bench.model, config, *rows, tokenizer=bench.tokenizer)
            emitted[edit].add_to(bench.model, edit)
    return emitted


def _match(bench: Bench, settings: DemoSettings, result: DemoResult) -> None:
    """Match each edit's forgetting, and measure its losses along the strength."""
    result.points = {"task": bench.losses(bench.full), "retain-only": bench.losses(bench.yardstick)}
    for edit in EDITS:
        with timed(result.seconds, f"strength curve of {LABELS[edit]}"):
            stack = bench.edited(edit)
            match = bench.match(stack, tolerance=_TOLERANCE)
            strengths = [factor * match.strength for factor in settings.curve]
            result.matches[edit] = match
            result.curves[edit] = bench.curve(stack, strengths, {0.0: result.points["task"]})


def _evaluate(bench: Bench, settings: DemoSettings, result: DemoResult) -> None:
    """Fill the table: the full model, each edit at its match, the retain-only model; of each edit at strength 1 only
    losses and probabilities."""
    matched = {edit: match.strength for edit, match in result.matches.items()}
    rows: list[tuple[str, float | None, Stack, bool]] = [("task", None, bench.full, True)]
    rows += [(edit, 1.0, bench.edited(edit), False) for edit in EDITS]
    rows += [(edit, strength, bench.edited(edit, strength), True) for edit, strength in matched.items()]
    rows += [("retain-only", None, bench.yardstick, True)]
    with timed(result.seconds, "evaluate"):
        for name, strength, stack, in_full in rows:
            subject = Subject(bench.model, bench.tokenizer, stack.adapters, show_progress_bar=False)
            with bench.scaled(stack):
                scores = {
                    split: evaluate_split(
                        subject,
                        bench.judged_rows[split],
                        is_forget=split == "forget",
                        generated=settings.generated_rows if in_full and _is_asked(bench.judged_rows[split]) else 0,
                        compared=settings.compared_rows if in_full else 0,
                        max_new_tokens=settings.max_new_tokens,
                    )
                    for split in SPLITS
                }
            result.table.append((LABELS[name], strength, scores))


def _is_asked(rows: Sequence[Mapping]) -> bool:
    return "text" not in rows[0]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
