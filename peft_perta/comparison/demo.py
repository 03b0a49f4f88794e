"""Train a forget adapter, weigh it, emit, stack, evaluate. Nothing is precomputed but the three shipped inputs: the
base, the task adapter that knows too much, and the retain-only model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from ..adapters import add_adapter, save_perta_adapter
from ..data import Sample, check_output, encode_row, read_rows, replaced_directory, spread
from ..evaluation import Match, SplitScores, Subject, evaluate_split, losses_of, match_forgetting
from ..model import adapter_strength, attach_adapters, load_base
from ..perta import PerTAConfig, get_perta_state_dict
from ..training import default_lora_config, train_forget_adapter
from ._demo_picture import draw_trade_off

ASSETS = Path(__file__).parent / "assets"


REPORT_NAME = "report.json"


PICTURE_NAME = "trade_off.png"


SPLITS = ("forget", "retain", "general")


EDITS = {"negation": "uniform", "perta-grad": "grad", "perta-fisher": "fisher"}  # adapter label -> weighting


LABELS = {
    "negation": "plain negation",
    "perta-grad": "PerTA-grad",
    "perta-fisher": "PerTA-fisher",
    "task": "full model",
    "retain-only": "retain-only model",
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo: chosen so that it takes under four minutes on two cores."""

    rank: int = 16
    epochs: int = 12
    learning_rate: float = 2e-3
    batch_size: int = 10
    weight_samples: int = 100
    evaluated_rows: int = 32
    generated_rows: int = 10
    curve: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0, 1.3)
    seed: int = 0


@dataclass
class DemoResult:
    """Every figure of the demo: ``table`` rows (label, strength, scores per split) and strength curves per edit."""

    table: list[tuple[str, float | None, dict[str, SplitScores]]] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    points: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
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


def prepare(
    settings: DemoSettings, *, four_bit: bool, assets: Path = ASSETS, forget_rows: int | None = None
) -> tuple[PeftModel, Any, dict[str, list[dict]]]:
    """The shipped model (or another directory's like it) with a forget adapter trained live ('forget') beside the
    shipped ones ('task', 'reference'); its tokenizer; and the rows of each split: of the forget rows the last so many
    (None: all)."""
    rows = {name: read_rows(assets / f"{name}.jsonl") for name in SPLITS}
    rows["forget"] = rows["forget"][-(forget_rows or 0) :]
    base, tokenizer = load_base(str(assets / "base"), four_bit=four_bit)
    model = train_forget_adapter(
        base,
        rows["forget"],
        tokenizer,
        lora_config=default_lora_config(settings.rank),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=0.05,
        logging_strategy="no",
        seed=settings.seed,
    )
    attach_adapters(model, {"task": assets / "task_adapter", "retain-only": assets / "retain_adapter"})
    return model, tokenizer, rows


def run_demo(output_dir: str | Path, *, four_bit: bool = False, settings: DemoSettings | None = None) -> DemoResult:
    """Run the demo and leave ``adapter/``, ``report.json`` and ``trade_off.png`` in ``output_dir``.

    Raises:
        OutputError: the directory is not ours to write.
    """
    settings = settings or DemoSettings()
    output_dir = Path(output_dir)
    check_output(output_dir, REPORT_NAME)
    result = DemoResult()
    clock = _Clock(result.seconds)
    print(f"1. train the forget adapter ({settings.epochs} epochs, rank {settings.rank})")
    with clock("train the forget adapter"):
        model, tokenizer, rows = prepare(settings, four_bit=four_bit)
    weight_rows = {"forget": rows["forget"], "retain": rows["retain"][::2][: settings.weight_samples]}
    judged_rows = {"forget": rows["forget"], "retain": rows["retain"][1::2], "general": rows["general"]}
    judged_rows = {name: spread(found, settings.evaluated_rows) for name, found in judged_rows.items()}

    print("2. gradients, weights and factors; emit a negative adapter for each of three weightings")
    emitted = {}
    for edit, weighting in EDITS.items():
        with clock(f"emit {LABELS[edit]}"):
            config = PerTAConfig(weighting=weighting, seed=settings.seed)
            data = () if weighting == "uniform" else (weight_rows["forget"], weight_rows["retain"])
            emitted[edit] = get_perta_state_dict(model, config, *data, tokenizer=tokenizer)
            lora_config, state_dict, _ = emitted[edit]
            add_adapter(model, lora_config, state_dict, edit)

    print("3. find the strength at which each edit forgets as much as the retain-only model never knew")
    samples = {name: [encode_row(row, tokenizer) for row in found] for name, found in judged_rows.items()}
    result.points = {
        name: {split: _mean(losses_of(model, samples[split], adapters=[name])) for split in SPLITS}
        for name in ("task", "retain-only")
    }
    target = result.points["retain-only"]["forget"]
    for edit in EDITS:
        with clock(f"strength curve of {LABELS[edit]}"):
            result.matches[edit] = match_forgetting(_forget_loss(model, samples["forget"], edit), target)
            result.curves[edit] = _curve(model, samples, edit, result.matches[edit].strength, settings.curve)

    print("4. evaluate every model")
    stacks = [("task", None, ["task"])]
    stacks += [(edit, 1.0, ["task", edit]) for edit in EDITS]
    stacks += [(edit, result.matches[edit].strength, ["task", edit]) for edit in EDITS]
    stacks += [("retain-only", None, ["retain-only"])]
    with clock("evaluate"):
        for name, strength, adapters in stacks:
            scores = _evaluate(model, tokenizer, judged_rows, adapters, name, strength, settings)
            result.table.append((LABELS[name], strength, scores))

    best = min(
        ("perta-grad", "perta-fisher"), key=lambda edit: sum(_at_match(result, edit)[s] for s in ("retain", "general"))
    )
    lora_config, state_dict, report = emitted[best]
    _, state_dict, report = emitted[best].scaled(result.matches[best].strength)
    with replaced_directory(output_dir, REPORT_NAME) as directory:
        save_perta_adapter(directory / "adapter", lora_config, state_dict, report)
        (directory / REPORT_NAME).write_text(json.dumps(result.to_dict(), indent=1) + "\n")
        draw_trade_off(result.curves, result.points, LABELS, directory / PICTURE_NAME)
    print(format_table(result))
    print(
        f"\n{LABELS[best]} at matched forgetting is in {output_dir / 'adapter'}; the figures are in "
        f"{output_dir / REPORT_NAME}, the trade-off in {output_dir / PICTURE_NAME}.\n"
        f"Next: peft-perta inspect {output_dir / 'adapter'}"
    )
    return result


def format_table(result: DemoResult) -> str:
    """The table as text: per split the answers' probability, ROUGE-L recall and truth score; the forget loss first."""
    head = f"{'model':<24}{'strength':>9}{'forget':>8}" + "".join(f"  |{name:^22}" for name in SPLITS)
    second = f"{'':<24}{'':>9}{'loss':>8}" + f"  |{'prob':>7}{'ROUGE-L':>8}{'truth':>7}" * len(SPLITS)
    lines = ["", head, second, "-" * len(second)]
    for label, strength, scores in result.table:
        shown = "" if strength is None else f"{strength:.2f}"
        line = f"{label:<24}{shown:>9}{scores['forget'].loss:>8.2f}"
        for name in SPLITS:
            s = scores[name]
            line += f"  |{s.probability:>7.3f}{_shown(s.rouge_l_recall):>8}{_shown(s.truth_score):>7}"
        lines.append(line)
    lines.append(
        "truth: on forget rows 1 means that truth and falsehood look alike; elsewhere higher means that "
        "truth is preferred.\n"
        "Edits appear at strength 1, and at matched forgetting: where their forget loss meets the retain-only model's."
    )
    return "\n".join(lines)


def _evaluate(
    model: PeftModel,
    tokenizer: Any,
    rows: dict[str, list[dict]],
    adapters: list[str],
    name: str,
    strength: float | None,
    settings: DemoSettings,
) -> dict[str, SplitScores]:
    subject = Subject(model, tokenizer, adapters, show_progress_bar=False)
    with adapter_strength(model, name, 1.0 if strength is None else strength):
        return {
            split: evaluate_split(subject, rows[split], is_forget=split == "forget", generated=settings.generated_rows)
            for split in SPLITS
        }


def _forget_loss(model: PeftModel, samples: list[Sample], edit: str) -> Any:
    def loss_at(strength: float) -> float:
        with adapter_strength(model, edit, strength):
            return _mean(losses_of(model, samples, adapters=["task", edit]))

    return loss_at


def _curve(
    model: PeftModel, samples: dict[str, list[Sample]], edit: str, matched: float, factors: Sequence[float]
) -> list[dict[str, float]]:
    points = []
    for factor in factors:
        with adapter_strength(model, edit, factor * matched):
            losses = {split: _mean(losses_of(model, samples[split], adapters=["task", edit])) for split in SPLITS}
        points.append({"strength": factor * matched, **losses})
    return points


def _at_match(result: DemoResult, edit: str) -> dict[str, float]:
    strength = result.matches[edit].strength
    return min(result.curves[edit], key=lambda point: abs(point["strength"] - strength))


def _mean(losses: Tensor) -> float:
    return float(losses.mean())


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class _Clock:
    """Wall seconds of each stage, into a mapping."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def __call__(self, stage: str) -> _Clock:
        self.stage = stage
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.stage] = round(time.perf_counter() - self.start, 1)
