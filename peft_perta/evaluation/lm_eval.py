"""General benchmarks by EleutherAI's lm-evaluation-harness, on a model with its adapters on.

Reference: Gao et al., github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..model import base_model, preserved, snapshot
from .generation import only_generation_config, plain_generation_config
from .subject import Subject

REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def general_benchmarks(
    subject: Subject,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks. Questions go through the tokenizer's chat template where it has one.

    Answers are decoded as the tasks say; as in ``generate``, nothing of the model's own generation_config counts but
    its eos tokens.

    Args:
        subject: the model with its adapters.
        tasks: names of lm-eval's tasks, groups or tags ('mmlu', 'hellaswag'), or of tasks in ``include_path``.
        include_path: a directory with the YAML files of further tasks.
        limit: the most rows of each task, from the first; None for all.

    Returns:
        'task/metric' -> {agg_value, value_by_index}. Groups, and metrics that are not defined for a row, have no rows.
        A filter other than lm-eval's 'none' follows the metric: 'gsm8k/exact_match,strict-match'.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    evaluator, models, task_files = _imported("evaluator", "models.huggingface", "tasks")
    if not tasks:
        raise ConfigError("expected at least one lm-eval task, found none; name one, such as 'hellaswag'")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1 row of each task, found {limit}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"expected a directory of task files at {include_path}, found none; check the path")
    model: Any = base_model(subject.model)  # lm-eval takes transformers' model, whose layers hold the adapters
    restore = snapshot(subject.model)  # lm-eval seeds every random state
    try:
        manager = _manager(task_files.TaskManager, tasks, include_path)
        loaded = _load(manager, tasks)
        plain = plain_generation_config(subject.tokenizer, model)
        with preserved(subject.model, subject.adapters), only_generation_config(model, plain):
            # ``preserved`` has prepared the model. HFLM would switch every layer to eval mode, in which 4-bit weights
            # are repacked on the CPU, and tie the weights of layers that adapters wrap.
            model.eval = lambda: model
            model.tie_weights = lambda: None
            judged = models.HFLM(model, tokenizer=copy.deepcopy(subject.tokenizer), batch_size=subject.batch_size)
            if not subject.show_progress_bar:
                for name in REQUESTS:
                    setattr(judged, name, functools.partial(getattr(judged, name), disable_tqdm=True))
            results = evaluator.simple_evaluate(
                judged,
                tasks=loaded,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=bool(getattr(subject.tokenizer, "chat_template", None)),
            )
    finally:
        restore()
    return _log(results)


def check_lm_eval() -> None:
    """
    Raises:
        ConfigError: lm-eval is not installed.
    """
    _imported("evaluator")


def _imported(*names: str) -> list[Any]:
    """These modules of lm-eval, which is an extra.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        return [importlib.import_module(f"lm_eval.{name}") for name in names]
    except ImportError as error:
        raise ConfigError(
            f"general benchmarks need lm-eval, found none ({error}); pip install 'peft-perta[benchmarks]'"
        ) from error


def _manager(task_manager: Callable[..., Any], names: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks.

    Indexing lm-eval's own tasks takes ten seconds and is left out where ``include_path`` holds all the named ones.
    """
    if include_path is None:
        return task_manager()
    alone = task_manager(include_path=str(include_path), include_defaults=False)
    return alone if set(names) <= set(alone.all_subtasks) else task_manager(include_path=str(include_path))


def _load(manager: Any, names: Sequence[str]) -> list[Any]:
    """lm-eval's task objects of these names; a group is one object.

    Raises:
        ConfigError: one is unknown, or its file or its data cannot be read.
    """
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            f"expected the names of lm-eval tasks, found {unknown[0]!r}, which is none of the {len(manager.all_tasks)} "
            "known; for a task of your own, name the directory of its YAML file"
        )
    objects: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever YAML, Jinja, datasets or the network raise
            raise ConfigError(
                f"the lm-eval task {name!r} could not be loaded ({type(error).__name__}: {' '.join(str(error).split())}"
                "); check its YAML file, and that its data is on this machine or within reach"
            ) from error
        objects += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return objects


def _log(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's results in the layout of an evaluation log."""
    log = {}
    for task, scores in {**results["results"], **results.get("groups", {})}.items():
        for name, value in scores.items():
            metric, _, filter_name = name.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            rows = {
                str(row["doc_id"]): {"score": float(row[metric])}
                for row in results["samples"].get(task, [])
                if row["filter"] == filter_name and isinstance(row.get(metric), Real)
            }
            key = f"{task}/{metric}" if filter_name == "none" else f"{task}/{name}"
            log[key] = {"agg_value": float(value), "value_by_index": rows}
    return log
