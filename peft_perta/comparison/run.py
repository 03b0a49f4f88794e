"""Run every method on the same bench: make its adapter, match its forgetting, and judge it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from tqdm.auto import tqdm

from ..adapters import add_adapter
from ..data import check_output, write_file
from ..errors import ConfigError, NumericalError
from ..evaluation import TOLERANCE, Log, Match
from ._judge import Judge
from ._picture import draw_comparison
from ._results import CONFIG_NAME, Results
from .bench import Bench, StrengthPath, timed
from .method import Method, MethodAdapter, measured
from .methods import METHODS
from .settings import MEASURES, ROWS_OF_AUTHOR, ComparisonSettings
from .table import FULL, ORIGIN, RETAIN_ONLY, format_table
from .testbed import SPLITS, Testbed, small

TABLE_NAME, PICTURE_NAME = "table.md", "trade_off.png"
_FORGET_ADAPTERS = "forget_adapters"  # directory: those that are trained already
_JUDGED = "perta_compared"  # name of the adapter that is judged
_AIM = 0.005  # of the target: where the search stops; if it runs out of evaluations, ``TOLERANCE`` is accepted


def run_comparison(
    output_dir: str | Path,
    settings: ComparisonSettings | None = None,
    testbed: Testbed | None = None,
    *,
    show_progress_bar: bool = True,
) -> list[dict[str, Any]]:
    """Do the runs of the settings that ``output_dir`` does not hold yet.

    The directory then holds ``results.jsonl`` (one line for each run and measure of forgetting, written when the run
    ends), ``config.json``, ``table.md``, ``trade_off.png`` and the forget adapters.

    Args:
        output_dir: an empty or missing directory, or one of an earlier comparison, which is resumed.
        settings: what to compare; by default every method.
        testbed: the model and its rows; by default the shipped ones.
        show_progress_bar: show a progress bar over runs.

    Returns:
        All results in the directory. Earlier results stay, also those of methods, seeds, forget sets and measures that
        the settings do not name.

    Raises:
        ConfigError: the directory holds results of other settings or of another model, or the testbed holds less than
            the settings need.
        OutputError: the directory is not ours to write, or the results in it are damaged.
    """
    settings = settings or ComparisonSettings()
    testbed = testbed or small()
    directory = check_output(output_dir, CONFIG_NAME, grows=True)
    _check_rows(testbed, settings)
    results = Results(directory, settings, testbed.digest())
    missing = {
        (authors, seed): {name: measures for name in settings.methods if (measures := [
            measure for measure in settings.matched if (name, authors, seed, measure) not in results
        ])}
        for authors in settings.authors or (None,)
        for seed in settings.seeds
    }  # fmt: skip
    bar = tqdm(total=sum(map(len, missing.values())), desc="methods", unit="run", disable=not show_progress_bar)
    with bar:
        for (authors, seed), methods in missing.items():
            if methods:
                _run_seed(testbed, settings, results, authors, seed, methods, bar)
    write_file(directory / TABLE_NAME, format_table(results.all()) + "\n")
    draw_comparison(results.all(), directory / PICTURE_NAME)
    return results.all()


def _run_seed(
    testbed: Testbed,
    settings: ComparisonSettings,
    results: Results,
    authors: int | None,
    seed: int,
    methods: Mapping[str, Sequence[str]],
    bar: tqdm,
) -> None:
    """Run the methods (name -> measures that are missing) on one seed's forget adapter."""
    seconds: dict[str, float] = {}
    with timed(seconds, "forget_adapter"):
        bench = Bench(
            settings.bench(authors, len(testbed.rows["forget"]), seed),
            four_bit=settings.four_bit,
            testbed=testbed,
            cache=results.directory / _FORGET_ADAPTERS / f"{authors or 'all'}-{seed}",
            has_forget_adapter=any(METHODS[name].needs_forget_adapter for name in methods),
        )
    judge = Judge(bench, testbed.suite_rows, settings)
    retain_only = _judge_baselines(judge, results, authors)
    for name, measures in methods.items():
        bar.set_postfix_str(f"{name}, seed {seed}")
        for result in _run(METHODS[name], judge, measures, retain_only, **seconds):
            results.add({"method": name, "authors": authors, "seed": seed, **result})
        bar.update()


def _check_rows(testbed: Testbed, settings: ComparisonSettings) -> None:
    """
    Raises:
        ConfigError: there are fewer forget authors than the settings name, too few retain rows to judge on, or no
            target in a measure.
    """
    targetless = [measure for measure in settings.matched if measure not in testbed.measures]
    if targetless:
        raise ConfigError(
            f"matched: expected some of {list(testbed.measures)}, which have a target here, found {targetless[0]!r}"
        )
    available = len(testbed.rows["forget"]) // ROWS_OF_AUTHOR
    if max(settings.authors, default=0) > available:
        raise ConfigError(
            f"authors: expected at most {available}, the number among the forget rows, found {max(settings.authors)}"
        )
    if len(testbed.rows["retain"]) < 2:
        raise ConfigError(
            "expected at least 2 retain rows, one that methods use and one that is judged, found "
            f"{len(testbed.rows['retain'])}"
        )


def _judge_baselines(judge: Judge, results: Results, authors: int | None) -> Log | None:
    """Judge the models that no seed changes, unless the results hold them. Returns the retain-only model's log."""
    bench = judge.bench
    stacks = {FULL: bench.full, RETAIN_ONLY: bench.retain_only, ORIGIN: bench.origin if bench.full.adapters else None}
    retain_only = judge.log(bench.retain_only) if bench.retain_only is not None else None
    for name, stack in stacks.items():
        if stack is not None and (name, authors, None, None) not in results:
            log = retain_only if name == RETAIN_ONLY else None
            measured = judge.measure(stack, retain_only, log)
            results.add({"method": name, "authors": authors, "seed": None, **measured})
    return retain_only


def _run(
    method: Method, judge: Judge, measures: Sequence[str], retain_only: Log | None, forget_adapter: float
) -> Iterator[dict[str, Any]]:
    """One method's part of its results, one for each measure of forgetting. If its adapter cannot be made or matched,
    ``failure`` says why, and nothing is judged.

    Args:
        forget_adapter: seconds that training the forget adapter took.
    """
    bench = judge.bench
    seconds = {"forget_adapter": forget_adapter if method.needs_forget_adapter else 0.0}
    common: dict[str, Any] = {"failure": None, "strength": None, "seconds": seconds}
    try:
        with measured(bench.setup) as effort:
            adapter = method.make(bench.setup)
    except NumericalError as error:
        yield from ({"matched": measure, **common, "failure": str(error)} for measure in measures)
        return
    effort = adapter.effort or effort
    seconds["edit"] = effort.seconds
    common |= {"memory": effort.memory, **_cost(method, adapter, bench)}
    add_adapter(bench.model, adapter.lora_config, adapter.state_dict, _JUDGED)
    try:
        path = bench.path(bench.edited(_JUDGED))
        common["as_made"] = path.at(1.0)
        for measure in measures:
            own = dict(seconds)
            judged = _judge_at_match(judge, path, measure, retain_only, own)
            yield {"matched": measure, **common, "seconds": own, **judged}
    finally:
        bench.model.delete_adapter(_JUDGED)


def _cost(method: Method, adapter: MethodAdapter, bench: Bench) -> dict[str, Any]:
    """The size of the adapter, and the compute that it took."""
    tensors = {key: value.contiguous() for key, value in adapter.state_dict.items()}
    return {
        "rank": adapter.lora_config.r,
        "bytes": len(safetensors.torch.save(tensors)),
        "forward_equivalents": {
            "forget_adapter": bench.training_cost if method.needs_forget_adapter else 0.0,
            "edit": adapter.forward_equivalents,
        },
    }


def _judge_at_match(
    judge: Judge, path: StrengthPath, measure: str, retain_only: Log | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """Measurements at matched forgetting, and losses along the strength."""
    bench, settings = judge.bench, judge.settings
    stack = bench.edited(_JUDGED)
    result: dict[str, Any] = {}
    matched = None
    with timed(seconds, "match"):
        try:
            match = _match(bench, path, measure)
            matched = stack.at(match.strength)
            result |= {"strength": match.strength, "forgotten": match.loss, "target": bench.target(measure)}
        except NumericalError as error:
            result["failure"] = str(error)
    with timed(seconds, "judge"):
        if matched is not None:
            result |= judge.measure(matched, retain_only)
        strength, measured = 1.0, {}
        if matched is not None:
            losses = {split: result["losses"][split] for split in SPLITS}
            strength, measured = matched.strength, {matched.strength: losses}
        points = bench.curve(stack, [factor * strength for factor in settings.curve], measured)
        result["curve"] = [{"factor": factor, **point} for factor, point in zip(settings.curve, points, strict=True)]
    return result


def _match(bench: Bench, path: StrengthPath, measure: str) -> Match:
    """The match of the adapter.

    Raises:
        NumericalError: no strength reaches the target, or the search ended too far from it.
    """
    match, target = path.match(measure, tolerance=_AIM), bench.target(measure)
    if abs(match.loss - target) > TOLERANCE * target:
        raise NumericalError(
            f"the {MEASURES[measure]} came to {match.loss:.3f} at best, expected {target:.3f} within {TOLERANCE:.0%}"
        )
    return match
