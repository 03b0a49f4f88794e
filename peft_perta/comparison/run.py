"""Run every method on the same bench: make its adapter, match its forgetting, and judge it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from tqdm.auto import tqdm

from ..adapters import add_adapter
from ..data import check_output, write_file
from ..errors import NumericalError
from ..evaluation import TOLERANCE, Log, Match
from ._assets import check_assets, hash_assets
from ._judge import Judge
from ._method import Method, MethodAdapter
from ._picture import draw_comparison
from ._results import CONFIG_NAME, Result, Results
from .bench import ASSETS, FULL_STACK, RETAIN_ONLY_STACK, Bench, Stack, timed
from .methods import METHODS
from .settings import MEASURES, ComparisonSettings
from .table import FULL, RETAIN_ONLY, format_table

TABLE_NAME, PICTURE_NAME = "table.md", "trade_off.png"
BASELINES = {FULL: FULL_STACK, RETAIN_ONLY: RETAIN_ONLY_STACK}
_JUDGED = "perta_compared"  # name of the adapter that is judged
_AIM = 0.005  # of the target: where the search stops; if it runs out of evaluations, ``TOLERANCE`` is accepted


def run_comparison(
    output_dir: str | Path, settings: ComparisonSettings | None = None, *, show_progress_bar: bool = True
) -> list[dict[str, Any]]:
    """Do the runs of the settings that ``output_dir`` does not hold yet.

    The directory then holds ``results.jsonl`` (one line for each run, written when the run ends), ``config.json``,
    ``table.md`` and ``trade_off.png``.

    Args:
        output_dir: an empty or missing directory, or one of an earlier comparison, which is resumed.
        settings: what to compare; by default every method on the shipped model.
        show_progress_bar: show a progress bar over runs.

    Returns:
        All results in the directory. Earlier results stay, also those of methods, seeds and forget sets that the
        settings do not name.

    Raises:
        ConfigError: the directory holds results of other settings or of another model, or the assets hold less than the
            settings need.
        DataError: a file of rows is missing or malformed.
        OutputError: the directory is not ours to write, or the results in it are damaged.
    """
    settings = settings or ComparisonSettings()
    assets = Path(settings.assets) if settings.assets is not None else ASSETS
    directory = check_output(output_dir, CONFIG_NAME)
    suite_splits = check_assets(assets, settings)
    results = Results(directory, settings, hash_assets(assets))
    missing = {
        (authors, seed): [name for name in settings.methods if (name, authors, seed) not in results]
        for authors in settings.authors
        for seed in settings.seeds
    }
    retain_only_logs: dict[int, Log] = {}
    bar = tqdm(total=sum(map(len, missing.values())), desc="methods", unit="run", disable=not show_progress_bar)
    with bar:
        for (authors, seed), names in missing.items():
            if not names:
                continue
            seconds: dict[str, float] = {}
            with timed(seconds, "forget_adapter"):
                bench = Bench(settings.bench(authors, seed), four_bit=settings.four_bit, assets=assets)
            judge = Judge(bench, suite_splits, settings)
            if authors not in retain_only_logs:
                retain_only_logs[authors] = judge.log(RETAIN_ONLY_STACK)
            retain_only = retain_only_logs[authors]
            for name, stack in BASELINES.items():
                if (name, authors, None) not in results:
                    log = retain_only if name == RETAIN_ONLY else None
                    results.add(_labelled(name, authors, None, judge.measure(stack, retain_only, log)))
            for name in names:
                bar.set_postfix_str(f"{name}, {authors} authors, seed {seed}")
                results.add(_labelled(name, authors, seed, _run(METHODS[name], judge, retain_only, **seconds)))
                bar.update()
    write_file(directory / TABLE_NAME, format_table(results.all()) + "\n")
    draw_comparison(results.all(), directory / PICTURE_NAME)
    return results.all()


def _labelled(name: str, authors: int, seed: int | None, measured: dict[str, Any]) -> Result:
    return {"method": name, "authors": authors, "seed": seed, **measured}


def _run(method: Method, judge: Judge, retain_only: Log, forget_adapter: float) -> dict[str, Any]:
    """One method's part of a result. If its adapter cannot be made or matched, ``failure`` says why, and nothing is
    judged.

    Args:
        forget_adapter: seconds that training the forget adapter took.
    """
    bench = judge.bench
    seconds = {"forget_adapter": forget_adapter if method.needs_forget_adapter else 0.0}
    result: dict[str, Any] = {
        "matched": bench.settings.matched,
        "failure": None,
        "strength": None,
        "seconds": seconds,
    }
    try:
        with timed(seconds, "edit"):
            adapter = method.make(bench.setup)
    except NumericalError as error:
        return {**result, "failure": str(error)}
    result |= _cost(method, adapter, bench)
    add_adapter(bench.model, adapter.lora_config, adapter.state_dict, _JUDGED)
    try:
        return result | _judge_at_match(judge, retain_only, seconds)
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


def _judge_at_match(judge: Judge, retain_only: Log, seconds: dict[str, float]) -> dict[str, Any]:
    """Losses of the adapter as it was made, measurements at matched forgetting, and losses along the strength."""
    bench, settings = judge.bench, judge.settings
    stack = Stack(["task", _JUDGED])
    result: dict[str, Any] = {"as_made": bench.losses(stack)}
    matched = None
    with timed(seconds, "match"):
        try:
            match = _match(bench, stack)
            matched = stack.at(match.strength)
            result |= {"strength": match.strength, "forgotten": match.loss}
        except NumericalError as error:
            result["failure"] = str(error)
    with timed(seconds, "judge"):
        if matched is not None:
            result |= judge.measure(matched, retain_only)
        strength, measured = (matched.strength, {matched.strength: result["losses"]}) if matched else (1.0, {})
        points = bench.curve(stack, [factor * strength for factor in settings.curve], measured)
        result["curve"] = [{"factor": factor, **point} for factor, point in zip(settings.curve, points, strict=True)]
    return result


def _match(bench: Bench, stack: Stack) -> Match:
    """The match of the stack.

    Raises:
        NumericalError: no strength reaches the target, or the search ended too far from it.
    """
    match = bench.match(stack, tolerance=_AIM)
    if abs(match.loss - bench.target) > TOLERANCE * bench.target:
        measure = MEASURES[bench.settings.matched]
        raise NumericalError(
            f"the {measure} came to {match.loss:.3f} at best, expected {bench.target:.3f} within {TOLERANCE:.0%}"
        )
    return match
