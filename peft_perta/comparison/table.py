"""Results as Markdown tables: what each method keeps at matched forgetting, what it leaves, and what it costs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .intervals import kept_against, kept_of_rows
from .methods import METHODS, REFINED
from .settings import MEASURES

FULL, RETAIN_ONLY, ORIGIN = "full model", "retain-only model", "origin"
BASELINES = (FULL, RETAIN_ONLY, ORIGIN)
Result = Mapping[str, Any]
Column = tuple[str, Callable[[Result], float | None], Callable[[float], str]]


def format_table(results: Sequence[Result]) -> str:
    """One section for each number of forget authors and measure of forgetting; cells are mean ± standard deviation over
    seeds."""
    sections = []
    for authors in dict.fromkeys(result["authors"] for result in results):
        own = [result for result in results if result["authors"] == authors]
        measures = dict.fromkeys(result["matched"] for result in own if result.get("matched"))
        for measure in measures or ["loss"]:
            sections.append(_section(authors, measure, [r for r in own if r.get("matched") in (None, measure)]))
    return "\n\n".join(sections)


def best_method(results: Sequence[Result]) -> str | None:
    """The method that a user can run which keeps most of the unseen retain rows at matched forgetting, as a mean over
    all measures and seeds. None where none was matched in every run."""
    kept: dict[str, list[float]] = {}
    failed = set()
    for result in results:
        name = result["method"]
        if name not in METHODS or METHODS[name].command is None or METHODS[name].family == "control":
            continue
        if result.get("failure"):
            failed.add(name)
        else:
            kept.setdefault(name, []).append(float(kept_of_rows(result).mean()))
    means = {name: statistics.fmean(values) for name, values in kept.items() if name not in failed}
    return max(means, key=lambda name: means[name]) if means else None


def _section(authors: int | None, measure: str, results: Sequence[Result]) -> str:
    by_method = {name: [r for r in results if r["method"] == name] for name in _ordered(results)}
    seeds = len({r["seed"] for r in results if r["seed"] is not None})
    methods = {name: runs for name, runs in by_method.items() if name not in BASELINES}
    forget_set = _counted(authors, "forget author") if authors else "all forget rows"
    yardstick = next((name for name in (RETAIN_ONLY, ORIGIN) if name in by_method), "given loss")
    target = ", by chance" if measure == "options" else f" of the {yardstick}"
    parts = [
        f"### {forget_set}, {_counted(seeds, 'seed')}",
        f"At matched forgetting ({MEASURES[measure]}{target}): what is kept. Losses in nats per token; no "
        "method saw the unseen retain rows.",
        _markdown(by_method, _KEPT),
    ]
    if any(r.get("scores") or r.get("depth") is not None for r in results):
        parts += ["At matched forgetting: what is left of the forget set (closest to the retain-only model is best).",
                  _markdown(by_method, _LEFT)]  # fmt: skip
    parts += ["Cost (in all: with the training of the forget adapter, if the method needs it).",
              _markdown(methods, _COST)]  # fmt: skip
    attack_columns = _attack_columns(results)
    if attack_columns:
        parts += ["Attacks at matched forgetting: loss of the forget rows (lower: more came back) or ROUGE-L.",
                  _markdown(by_method, attack_columns)]  # fmt: skip
    if len(methods) > 1:
        parts += ["What is kept of the unseen retain rows, against controls: the mean difference and its 95 % interval "
                  "(a bootstrap over rows).", _differences(methods)]  # fmt: skip
    failures = [f"- {r['method']}, seed {r['seed']}: {r['failure']}" for r in results if r.get("failure")]
    if failures:
        parts += ["Not matched, and left out of the means:", "\n".join(failures)]
    return "\n\n".join(parts)


def _ordered(results: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(r["method"] for r in results))
    return sorted(names, key=lambda name: BASELINES.index(name) if name in BASELINES else len(BASELINES))


def _markdown(by_method: Mapping[str, Sequence[Result]], columns: Sequence[Column]) -> str:
    """A table of means; columns that no run has a value for are left out."""
    runs = list(itertools.chain(*by_method.values()))
    columns = [column for column in columns if any(column[1](run) is not None for run in runs)]
    lines = [
        " | ".join(["| method", *(title for title, _, _ in columns)]) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, runs in by_method.items():
        cells = [_cell([read(result) for result in runs], shown) for _, read, shown in columns]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    return "\n".join(lines)


def _differences(methods: Mapping[str, Sequence[Result]]) -> str:
    """Each method's difference from the controls that were run; of a refined method, from the method itself."""
    controls = {"plain negation": "negation", "shuffled weights": "shuffled"}
    controls = {title: name for title, name in controls.items() if name in methods}
    lines = ["| method | " + " | ".join(f"against {title}" for title in (*controls, "itself, not refined")) + " |"]
    lines.append("|---" * (2 + len(controls)) + "|")
    for name, runs in methods.items():
        others = [*controls.values(), name.removesuffix(REFINED)]
        found = [kept_against(runs, methods.get(other, ())) if other != name else None for other in others]
        lines.append(" | ".join([f"| {name}", *(str(difference or "-") for difference in found)]) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    """Mean ± standard deviation of the measured values; without a deviation if they are all equal."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "-"
    deviation = f" ± {shown(statistics.stdev(measured))}" if len(set(measured)) > 1 else ""
    return shown(statistics.fmean(measured)) + deviation


def _value(*path: str) -> Callable[[Result], float | None]:
    """Reads a value below nested keys; None where a key is missing."""

    def read(result: Result) -> float | None:
        value: Any = result
        for key in path:
            value = (value or {}).get(key)
        return value

    return read


def _right_option(split: str) -> Callable[[Result], float | None]:
    """Reads the mean probability of a split's right answers among all their answers."""

    def read(result: Result) -> float | None:
        scores = (result.get("rows") or {}).get(split, {})
        return 1 - statistics.fmean(scores["misled"]) if "misled" in scores else None

    return read


def _log10_quality(result: Result) -> float | None:
    quality = _value("scores", "forget_quality")(result)
    return None if quality is None else math.log10(max(quality, 1e-300))


def _total(cost: str) -> Callable[[Result], float | None]:
    """Reads a cost of the forget adapter and the edit together."""

    def read(result: Result) -> float | None:
        parts = [_value(cost, part)(result) for part in ("forget_adapter", "edit")]
        return None if None in parts else sum(filter(None, parts))

    return read


def _megabytes(result: Result) -> float | None:
    return None if result.get("bytes") is None else result["bytes"] / 1e6


def _gibibytes(result: Result) -> float | None:
    return None if result.get("memory") is None else result["memory"] / 2**30


def _attack_columns(results: Sequence[Result]) -> list[Column]:
    """One column for each attack in each setting: its loss, or ROUGE-L where it measures no loss."""
    attacks = [attack for result in results for attack in result.get("attacks", ())]
    measures = {(a["attack"], a["setting"]): "loss" if "loss" in a else "rouge_l_recall" for a in attacks}

    def reader(attack: str, setting: str, measure: str) -> Callable[[Result], float | None]:
        def read(result: Result) -> float | None:
            own = result.get("attacks", ())
            return next((a[measure] for a in own if (a["attack"], a["setting"]) == (attack, setting)), None)

        return read

    suffixes = {"loss": "", "rouge_l_recall": " (ROUGE-L)"}
    return [
        (f"{attack}: {setting}{suffixes[measure]}", reader(attack, setting, measure), _three)
        for (attack, setting), measure in measures.items()
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_three, _two, _one, _whole = "{:.3f}".format, "{:.2f}".format, "{:.1f}".format, "{:.0f}".format

_KEPT: list[Column] = [
    ("strength", _value("strength"), _two),
    ("forget loss", _value("losses", "forget"), _three),
    ("first choices lost", _value("missed"), _three),
    ("unseen retain probability", _value("probabilities", "retain"), _three),
    ("unseen retain loss", _value("losses", "retain"), _three),
    ("unseen retain, right option", _right_option("retain"), _three),
    ("forget, right option", _right_option("forget"), _three),
    ("seen retain probability", _value("probabilities", "seen"), _three),
    ("general loss", _value("losses", "general"), _three),
    ("real authors, options", _value("scores", "ra_Q_A_Prob_normalised"), _three),
    ("world facts, options", _value("scores", "wf_Q_A_Prob_normalised"), _three),
    ("retain ROUGE-L", _value("scores", "retain_Q_A_ROUGE"), _three),
    ("model utility", _value("scores", "model_utility"), _three),
]

_LEFT: list[Column] = [
    ("probability", _value("scores", "forget_Q_A_Prob"), _three),
    ("ROUGE-L", _value("scores", "forget_Q_A_ROUGE"), _three),
    ("truth score", _value("scores", "forget_truth_ratio"), _three),
    ("log10 forget quality", _log10_quality, _two),
    ("extraction strength", _value("scores", "extraction_strength"), _three),
    ("exact memorization", _value("scores", "exact_memorization"), _three),
    ("privleak", _value("scores", "privleak"), _one),
    ("UDS", _value("depth"), _three),
]

_COST: list[Column] = [
    ("rank", _value("rank"), _whole),
    ("adapter, MB", _megabytes, _two),
    ("edit, s", _value("seconds", "edit"), _one),
    ("edit, forward-equivalents", _value("forward_equivalents", "edit"), _two),
    ("edit, GiB at its peak", _gibibytes, _two),
    ("in all, s", _total("seconds"), _one),
    ("in all, forward-equivalents", _total("forward_equivalents"), _two),
]
