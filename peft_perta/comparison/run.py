"""Every method on one setup: made, brought to matched forgetting, judged there and along its strength."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from tqdm.auto import tqdm

from ..adapters import add_adapter
from ..data import check_output, encode_row, read_rows, spread, write_file
from ..errors import ConfigError, DataError, NumericalError, OutputError
from ..evaluation import (
    SUITES,
    AttackSettings,
    Log,
    Splits,
    Subject,
    Victims,
    aggregate,
    evaluate,
    exact_memorization,
    losses_of,
    match_forgetting,
    run_attacks,
    score_completions,
    summary,
)
from ..model import adapter_strength, hash_file
from ._method import Setup
from ._picture import draw_comparison
from .demo import ASSETS, SPLITS, DemoSettings, prepare
from .methods import METHODS
from .settings import MEASURES, SELECTION, ComparisonSettings
from .table import FULL, RETAIN_ONLY, format_table

CONFIG_NAME, RESULTS_NAME, TABLE_NAME, PICTURE_NAME = "config.json", "results.jsonl", "table.md", "trade_off.png"


ROWS_OF_AUTHOR = 20


BASELINES = {FULL: "task", RETAIN_ONLY: "retain-only"}


_MADE = "perta_compared"  # the adapter that is judged


_TOLERANCE = 0.005  # of what is matched


_ALLOWED = 0.02  # the same where the search runs out of evaluations


_RELEARNED = 10  # rows


Key = tuple[str, int, int | None]


def run_comparison(
    output_dir: str | Path, settings: ComparisonSettings | None = None, *, show_progress_bar: bool = True
) -> list[dict[str, Any]]:
    """Run what is missing in ``output_dir`` of the settings' runs, and leave there ``results.jsonl`` (a line a run,
    written as soon as it is done), ``config.json``, ``table.md`` and ``trade_off.png``.

    Returns:
        The results in the directory, earlier ones among them: those of more methods, seeds or forget sets than the
        settings name stay.

    Raises:
        ConfigError: the directory holds the results of other settings or of another model, or the assets are fewer
            than the settings ask.
        DataError: the assets, or the results that are there, are missing or malformed.
        OutputError: the directory is not ours to write.
    """
    settings = settings or ComparisonSettings()
    assets = Path(settings.assets) if settings.assets is not None else ASSETS
    directory = check_output(output_dir, CONFIG_NAME)
    suite = _check_assets(assets, settings)
    record = {"settings": settings.to_dict(), "assets_sha256": _hash_assets(assets)}
    results = _earlier(directory, record)
    write_file(directory / CONFIG_NAME, json.dumps(record, indent=1) + "\n")

    setups = [(authors, seed) for authors in settings.authors for seed in settings.seeds]
    missing = {
        (authors, seed): [name for name in settings.methods if (name, authors, seed) not in results]
        for authors, seed in setups
    }
    retain_only_logs: dict[int, Log] = {}
    bar = tqdm(total=sum(map(len, missing.values())), desc="methods", unit="run", disable=not show_progress_bar)
    with bar:
        for (authors, seed), names in missing.items():
            if not names:
                continue
            bench = _Bench(settings, assets, suite, authors, seed)
            if authors not in retain_only_logs:
                retain_only_logs[authors] = bench.log_of(_Stack([BASELINES[RETAIN_ONLY]]))
            for name in BASELINES:
                if (name, authors, None) not in results:
                    _keep(results, bench.baseline(name, retain_only_logs[authors]), directory)
            for name in names:
                bar.set_postfix_str(f"{name}, {authors} authors, seed {seed}")
                _keep(results, bench.run(name, retain_only_logs[authors]), directory)
                bar.update()
    found = list(results.values())
    write_file(directory / TABLE_NAME, format_table(found) + "\n")
    draw_comparison(found, directory / PICTURE_NAME)
    return found


@dataclass(frozen=True)
class _Stack:
    """The adapters that are judged together, the last one at its strength."""

    adapters: list[str]
    strength: float = 1.0


class _Bench:
    """One seed's forget adapter on the model, the rows that may give gradients, and those that judge."""

    def __init__(self, settings: ComparisonSettings, assets: Path, suite: Splits, authors: int, seed: int) -> None:
        self.settings, self.authors, self.seed = settings, authors, seed
        count = authors * ROWS_OF_AUTHOR
        epochs = max(settings.epochs, math.ceil(settings.least_steps / math.ceil(count / settings.batch_size)))
        training = DemoSettings(
            rank=settings.rank,
            epochs=epochs,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            seed=seed,
        )
        start = time.perf_counter()
        self.model, self.tokenizer, rows = prepare(
            training, four_bit=settings.four_bit, assets=assets, forget_rows=count
        )
        self.seconds = time.perf_counter() - start
        weighed = rows["retain"][::2][: settings.weight_samples]
        self.setup = Setup(self.model, self.tokenizer, rows["forget"], weighed, settings.rank, seed)
        kept = rows["retain"][1::2]
        self.rows = {
            "forget": spread(rows["forget"], settings.judged_rows),
            "retain": spread(kept, settings.judged_rows),
            "general": spread(rows["general"], settings.judged_rows),
        }
        self.samples = {name: [encode_row(row, self.tokenizer) for row in self.rows[name]] for name in SPLITS}
        self.suite = {**suite, "forget": rows["forget"], "retain": [r for r in kept if r.get("perturbed_answer")]}
        tokens = [
            sum(len(encode_row(row, self.tokenizer).input_ids) for row in found) for found in (rows["forget"], weighed)
        ]
        # A forward and backward of a LoRA, each epoch, over the forget set alone.
        self.forward_equivalents = 2 * epochs * tokens[0] / sum(tokens)
        full, retain_only = (_Stack([adapter]) for adapter in ("task", "retain-only"))
        self.forgotten_by_full, self.target = (self.forgotten(stack) for stack in (full, retain_only))

    def losses(self, stack: _Stack, splits: Sequence[str] = SPLITS) -> dict[str, float]:
        """Mean loss of the judged rows of each split, nats per token."""
        with adapter_strength(self.model, stack.adapters[-1], stack.strength):
            return {
                name: float(losses_of(self.model, self.samples[name], adapters=stack.adapters).double().mean())
                for name in splits
            }

    def forgotten(self, stack: _Stack) -> float:
        """How much of the judged forget rows is forgotten, in the settings' measure."""
        if self.settings.matched == "loss":
            return self.losses(stack, ("forget",))["forget"]
        subject = Subject(self.model, self.tokenizer, stack.adapters, show_progress_bar=False)
        with adapter_strength(self.model, stack.adapters[-1], stack.strength):
            readings = score_completions(subject, self.rows["forget"])
        shares = [exact_memorization(reading.tokens.hits) for reading in readings]
        return 1 - statistics.fmean(share for share in shares if share is not None)

    def log_of(self, stack: _Stack) -> Log:
        """The suite's log, measured against no retain-only model."""
        with adapter_strength(self.model, stack.adapters[-1], stack.strength):
            return evaluate(
                self.model,
                self.tokenizer,
                {"tofu": self.suite},
                adapters=stack.adapters,
                rows=self.settings.suite_rows,
                max_new_tokens=self.settings.max_new_tokens,
                show_progress_bar=False,
            )["tofu"]

    def judge(self, stack: _Stack, retain_only: Log, log: Log | None = None) -> dict[str, Any]:
        """Losses, the suite's metrics against the retain-only model's log, and what attacks bring back: a part of a result."""
        log = log or self.log_of(stack)
        return {
            "losses": self.losses(stack),
            "scores": summary(aggregate(log, retain_only)),
            "attacks": self._attacked(stack) if self.settings.attacks else [],
        }

    def _attacked(self, stack: _Stack) -> list[dict[str, Any]]:
        subject = Subject(self.model, self.tokenizer, stack.adapters, show_progress_bar=False)
        rows = self.rows["forget"]
        settings = AttackSettings(
            relearning_rows=(min(_RELEARNED, max(1, len(rows) // 2)),),
            generated=self.settings.suite_rows,
            max_new_tokens=self.settings.max_new_tokens,
        )
        victims = Victims(subject, None, None, rows)  # the full and the retain-only model are rows of their own
        with adapter_strength(self.model, stack.adapters[-1], stack.strength):
            found = run_attacks(victims, self.settings.attacks, settings)
        return [{"attack": r.attack, "setting": r.setting, **r.unlearned} for r in found]

    def baseline(self, name: str, retain_only: Log) -> dict[str, Any]:
        log = retain_only if name == RETAIN_ONLY else None
        judged = self.judge(_Stack([BASELINES[name]]), retain_only, log)
        return {"method": name, "authors": self.authors, "seed": None, **judged}

    def run(self, name: str, retain_only: Log) -> dict[str, Any]:
        """The result of one method; where it cannot be matched, ``failure`` says why, and nothing is judged."""
        method = METHODS[name]
        result: dict[str, Any] = {
            "method": name, "authors": self.authors, "seed": self.seed, "matched": self.settings.matched,
            "failure": None, "strength": None,
        }  # fmt: skip
        seconds = {"forget_adapter": self.seconds if method.needs_forget_adapter else 0.0}
        result["seconds"] = seconds
        try:
            with _timed(seconds, "edit"):
                made = method.make(self.setup)
        except NumericalError as error:
            return {**result, "failure": str(error)}
        result["rank"] = made.lora_config.r
        result["bytes"] = len(safetensors.torch.save({k: v.contiguous() for k, v in made.state_dict.items()}))
        result["forward_equivalents"] = {
            "forget_adapter": self.forward_equivalents if method.needs_forget_adapter else 0.0,
            "edit": made.forward_equivalents,
        }
        add_adapter(self.model, made.lora_config, made.state_dict, _MADE)
        try:
            stack = _Stack(["task", _MADE])
            result["as_made"] = self.losses(stack)
            with _timed(seconds, "match"):
                try:
                    strength, result["forgotten"] = self._matched(stack)
                except NumericalError as error:
                    result["failure"], strength = str(error), 1.0
            result["strength"] = None if result["failure"] else strength
            with _timed(seconds, "judge"):
                if result["failure"] is None:
                    result |= self.judge(replace(stack, strength=strength), retain_only)
                result["curve"] = list(self._curve(stack, strength, {1.0: result.get("losses")}))
        finally:
            self.model.delete_adapter(_MADE)
        return result

    def _matched(self, stack: _Stack) -> tuple[float, float]:
        """A strength, and how much is forgotten there.

        Raises:
            NumericalError: the search ended off its target.
        """

        def forgotten_at(strength: float) -> float:
            return self.forgotten(replace(stack, strength=strength)) if strength else self.forgotten_by_full

        measure = MEASURES[self.settings.matched]
        found = match_forgetting(forgotten_at, self.target, tolerance=_TOLERANCE, measure=measure)
        if abs(found.loss - self.target) > _ALLOWED * self.target:
            raise NumericalError(
                f"the {measure} came to {found.loss:.3f} at best, expected {self.target:.3f} within {_ALLOWED:.0%}"
            )
        return found.strength, found.loss

    def _curve(
        self, stack: _Stack, strength: float, known: Mapping[float, dict[str, float] | None]
    ) -> Iterator[dict[str, float]]:
        for factor in self.settings.curve:
            at = replace(stack, strength=factor * strength)
            yield {"factor": factor, "strength": at.strength, **(known.get(factor) or self.losses(at))}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - start, 2)


def _key(result: Mapping[str, Any]) -> Key:
    return result["method"], result["authors"], result["seed"]


def _keep(results: dict[Key, dict[str, Any]], result: dict[str, Any], directory: Path) -> None:
    """Written whole at each run: a kill leaves the lines before or the lines after."""
    results[_key(result)] = result
    write_file(directory / RESULTS_NAME, "".join(json.dumps(found) + "\n" for found in results.values()))


def _check_assets(assets: Path, settings: ComparisonSettings) -> Splits:
    """Everything that can be refused before any compute; the splits that only the suite reads."""
    for name in ("base/config.json", "task_adapter/adapter_config.json", "retain_adapter/adapter_config.json"):
        if not (assets / name).is_file():
            raise ConfigError(
                f"assets: expected {name} in {assets}, found none; give a directory that examples/demo_model/build.py "
                "made"
            )
    rows = {name: read_rows(assets / f"{name}.jsonl") for name in SPLITS}
    there, asked = len(rows["forget"]) // ROWS_OF_AUTHOR, max(settings.authors)
    if asked > there:
        raise ConfigError(
            f"authors: expected at most {there}, as many as {assets / 'forget.jsonl'} holds, found {asked}"
        )
    if not any(row.get("perturbed_answer") for row in rows["retain"][1::2]):
        raise DataError(
            f"{assets / 'retain.jsonl'}: expected 'perturbed_answer' among every second row, which judge; found none"
        )
    splits = SUITES["tofu"].read(assets, None)
    return {name: found for name, found in splits.items() if name not in ("forget", "retain")}


def _hash_assets(assets: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(assets.rglob("*")):
        if path.suffix in (".jsonl", ".json", ".safetensors"):
            digest.update(f"{path.relative_to(assets).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def _earlier(directory: Path, record: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """The results that are there already.

    Raises:
        ConfigError: they are of other settings, or of another model.
        OutputError: they, or their settings, are damaged.
    """
    if not (directory / CONFIG_NAME).is_file():
        return {}
    try:
        before = json.loads((directory / CONFIG_NAME).read_text())
        ours, theirs = record["settings"], ComparisonSettings.from_dict(before["settings"]).to_dict()
        differing = [name for name in ours if name not in SELECTION and ours[name] != theirs[name]]
        same_model = before["assets_sha256"] == record["assets_sha256"]
        path = directory / RESULTS_NAME
        lines = path.read_text().splitlines() if path.is_file() else []
        results = {_key(result): result for result in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{directory} holds a damaged comparison ({error!r}); choose another output") from error
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{directory} holds results with {name} = {theirs[name]!r}, found {ours[name]!r} here; only "
            f"{', '.join(SELECTION)} may differ: choose another output"
        )
    if not same_model:
        raise ConfigError(f"{directory} holds results of another model or other rows; choose another output")
    return results
