"""From rows to a negative adapter: ``demo``, ``forget``, ``unlearn``, ``calibrate``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from peft import PeftModel

from ..adapters import (
    DTYPES,
    FORGET_RECORD_NAME,
    PROVENANCE_NAME,
    EmittedAdapter,
    PerTAProvenance,
    add_adapter,
    extrapolate_adapter,
    load_provenance,
    save_perta_adapter,
)
from ..comparison import DemoSettings, run_demo
from ..data import Sample, check_output, load_samples, read_rows
from ..errors import AdapterError, ConfigError, DataError
from ..evaluation import Calibration, Goal, calibrate, forget_loss_of_log, losses_of
from ..gradients import remove_checkpoint
from ..html_report import PICTURE_NAME, draw_calibration, report_data_of_rows, write_html_report
from ..model import attach_adapters, check_adapter_files, distributed, load_skeleton, read_adapter
from ..perta import (
    ALLOCATIONS,
    FIT_NAMES,
    GRADIENTS_AT,
    GRANULARITY_NAMES,
    PerTAConfig,
    get_perta_state_dict,
    resolve_weighting,
)
from ..training import default_lora_config, train_forget_adapter
from ._options import HTML_REPORT_NAME, ROWS_HELP, add_command, add_model, check_distinct, load_model, seed_of

CHOICES = {"granularity": GRANULARITY_NAMES, "fit": FIT_NAMES, "allocation": ALLOCATIONS,
           "gradients_at": GRADIENTS_AT, "dtype": DTYPES}  # fmt: skip


def add_commands(commands) -> None:
    demo = add_command(
        commands, "demo", _demo, "run the main job on TOFU with the small Llama that ships with the package"
    )
    demo.add_argument("--four-bit", action="store_true", help="quantise the base to NF4")
    demo.add_argument("--output", metavar="DIR", help="default: perta_demo, or perta_demo_4bit with --four-bit")
    demo.add_argument("--seed", type=seed_of, default=0, help="seed of the forget adapter's training (default: 0)")

    forget = add_command(commands, "forget", _forget, "train a forget adapter on what must go (LoRA or QLoRA, by TRL)")
    add_model(forget)
    forget.add_argument("--forget", required=True, metavar="ROWS", help=f"what must go: {ROWS_HELP}")
    forget.add_argument("--output", required=True, metavar="DIR", help="directory of the forget adapter")
    forget.add_argument("--rank", type=int, default=16, help="LoRA rank; lora_alpha is twice that (default: 16)")
    forget.add_argument("--epochs", type=float, default=10, help="passes over the rows (default: 10)")
    forget.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default: 0.001)")
    forget.add_argument("--batch-size", type=int, default=8, help="rows per step (default: 8)")
    forget.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    forget.add_argument("--seed", type=seed_of, default=0, help="seed of init and order (default: 0)")

    unlearn = add_command(
        commands, "unlearn", _unlearn, "forget adapter + forget rows + retain rows -> negative adapter", _checkpoint
    )
    add_model(unlearn)
    unlearn.add_argument("--forget-adapter", required=True, metavar="DIR", help="LoRA trained on the forget rows alone")
    unlearn.add_argument(
        "--task-adapter", metavar="DIR", help="the adapter that knows too much; used with --gradients-at full"
    )
    unlearn.add_argument("--forget", metavar="ROWS", help=f"what must go: {ROWS_HELP}")
    unlearn.add_argument("--retain", metavar="ROWS", help="what must stay, likewise")
    unlearn.add_argument("--output", required=True, metavar="DIR", help="directory of the negative adapter")
    unlearn.add_argument(
        "--html-report",
        action="store_true",
        help=f"draw what was done, and what it changed, into {HTML_REPORT_NAME} there",
    )
    for field in dataclasses.fields(PerTAConfig):
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        if field.name not in _TYPES:
            unlearn.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
            continue
        default = "" if field.default is None else f" (default: {field.default})"
        choices = CHOICES.get(field.name)
        unlearn.add_argument(name, type=_TYPES[field.name], default=field.default, choices=choices, help=text + default)

    calibrate = add_command(commands, "calibrate", _calibrate, "find the strength that meets a goal, and rescale")
    add_model(calibrate)
    calibrate.add_argument("--adapter", required=True, metavar="DIR", help="a negative adapter that unlearn wrote")
    _add_goal(calibrate, required=True)
    calibrate.add_argument("--forget-adapter", metavar="DIR", help="draw its plain negation beside")
    calibrate.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    calibrate.add_argument("--output", required=True, metavar="DIR", help="directory of the rescaled adapter")

    further = add_command(commands, "extrapolate", _extrapolate, "go further along an unlearning run (UIPE)")
    add_model(further)
    further.add_argument("--adapter", required=True, metavar="DIR", help="an unlearning adapter, anyone's: plain LoRA")
    further.add_argument("--start-adapter", metavar="DIR", help="the adapter that its run began at, if not at zero")
    further.add_argument("--alpha", type=_alpha, default="auto", help="0: as it is; or auto, by a goal (default: auto)")
    _add_goal(further, required=False)
    further.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    further.add_argument("--output", required=True, metavar="DIR", help="directory of the extrapolated adapter")


def _add_goal(command: argparse.ArgumentParser, *, required: bool) -> None:
    """What a search for a strength judges by."""
    command.add_argument("--task-adapter", metavar="DIR", help="the adapter that knows too much, where it is one")
    command.add_argument("--forget", required=required, metavar="ROWS", help=f"rows to forget: {ROWS_HELP}")
    command.add_argument("--retain", required=required, metavar="ROWS", help="rows to keep that gave no gradients")
    goal = command.add_mutually_exclusive_group(required=required)
    goal.add_argument("--target-forget-loss", type=float, help="match this mean forget loss (nats per token)")
    goal.add_argument("--retain-only-log", metavar="JSON", help="match that of a retain-only model's TOFU_EVAL.json")
    goal.add_argument("--retain-only-adapter", metavar="DIR", help="match that of the base with this adapter on")
    goal.add_argument(
        "--retain-tolerance", type=float, help="the most forgetting that raises the retain loss by no more than this"
    )


def _rank(text: str) -> int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"expected an int from 1 to 256 or a float in (0, 1), found {text!r}")


def _strength(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'auto', found {text!r}") from None


def _alpha(text: str) -> float | str:
    return _strength(text)


_TYPES = {
    "weighting": str,
    "granularity": str,
    "power": float,
    "rank": _rank,
    "allocation": str,
    "fit": str,
    "strength": _strength,
    "target_forget_loss": float,
    "retain_tolerance": float,
    "fit_kl_samples": int,
    "gradients_at": str,
    "max_samples": int,
    "seed": int,
    "batch_size": int,
    "max_memory": str,
    "host_memory": str,
    "max_length": int,
    "dtype": str,
}


def _demo(options: argparse.Namespace) -> None:
    output = options.output or ("perta_demo_4bit" if options.four_bit else "perta_demo")
    run_demo(output, four_bit=options.four_bit, settings=DemoSettings(seed=options.seed))


def _forget(options: argparse.Namespace) -> None:
    for name, least in (("rank", 1), ("batch_size", 1), ("max_length", 2)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(options, name)}")
    for name in ("epochs", "learning_rate"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: expected a number > 0, found {getattr(options, name)}")
    check_output(options.output, FORGET_RECORD_NAME)
    rows = read_rows(options.forget)
    model, tokenizer = load_model(options)
    train_forget_adapter(
        model,
        rows,
        tokenizer,
        options.output,
        lora_config=default_lora_config(options.rank),
        max_length=options.max_length,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        seed=options.seed,
    )
    print(f"the forget adapter is in {options.output}\nNext: peft-perta unlearn --forget-adapter {options.output} ...")


def _unlearn(options: argparse.Namespace) -> None:
    config = PerTAConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(PerTAConfig)})
    if ":" in config.weighting and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as with python -m: the user's own weighting may lie where they stand
    weighting = resolve_weighting(config.weighting, config.power)
    for name in ("forget", "retain"):
        if weighting.statistic and not getattr(options, name):
            raise DataError(f"--{name}: expected a file of rows, found none; only --weighting uniform goes without")
    distributed.start()
    check_output(options.output, PROVENANCE_NAME)
    adapters = {"forget": options.forget_adapter}
    if options.task_adapter:
        adapters["task"] = options.task_adapter
    for directory in adapters.values():
        check_adapter_files(directory)
    rows = {name: read_rows(path) if (path := getattr(options, name)) else None for name in ("forget", "retain")}
    base, tokenizer = load_model(options)
    model = attach_adapters(base, adapters)
    lora_config, state_dict, provenance = get_perta_state_dict(
        model,
        config,
        *rows.values(),
        task_adapter="task" if options.task_adapter else None,
        tokenizer=tokenizer,
        checkpoint_dir=_checkpoint(options),
    )
    if distributed.is_main():
        save_perta_adapter(options.output, lora_config, state_dict, provenance)
        remove_checkpoint(_checkpoint(options))
        print(f"{provenance}\nIt is in {options.output}")
        if provenance.calibration is not None:
            found = Calibration.from_dict(provenance.calibration)
            draw_calibration(found, Path(options.output) / PICTURE_NAME)
            print(f"{found}\nIts curve is in {Path(options.output) / PICTURE_NAME}")
        if options.html_report:
            add_adapter(model, lora_config, state_dict, "perta_unlearn")
            _draw(options, model, tokenizer, {name: found for name, found in rows.items() if found})
            print(f"What it changed is in {Path(options.output) / HTML_REPORT_NAME}")
        print(f"Next: peft-perta verify {options.output} --base {options.model}, then stack it on the model")
    distributed.finish()


def _draw(options: argparse.Namespace, model, tokenizer, rows: dict[str, list[dict]]) -> None:
    before = ["task"] if options.task_adapter else []
    report_data = report_data_of_rows(
        model,
        tokenizer,
        rows,
        {"before": before, "after": [*before, "perta_unlearn"]},
        title=f"What '{Path(options.output).name}' removed",
        base_model=options.model,
        adapters=[*filter(None, [options.task_adapter]), options.output],
        commands=[options.line],
    )
    write_html_report(report_data, Path(options.output) / HTML_REPORT_NAME)


def _checkpoint(options: argparse.Namespace) -> str:
    """Where an interrupted ``unlearn`` leaves what it has."""
    return f"{options.output.rstrip(os.sep)}.checkpoint"


def _calibrate(options: argparse.Namespace) -> None:
    check_output(options.output, PROVENANCE_NAME)
    named = _checked(
        {
            "unlearn": options.adapter,
            "task": options.task_adapter,
            "forget": options.forget_adapter,
            "retain-only": options.retain_only_adapter,
        }
    )
    provenance, _ = load_provenance(options.adapter)
    if not isinstance(provenance, PerTAProvenance):
        raise AdapterError(f"{options.adapter} was not made by unlearn; of fused adapters, calibrate the parts first")
    model, goal, samples = _searched(options, named)
    found = calibrate(
        model,
        goal,
        samples["forget"],
        samples["retain"],
        adapter_name="unlearn",
        with_adapters=["task"] if options.task_adapter else [],
        negated_adapter="forget" if options.forget_adapter else None,
        retain_only=["retain-only"] if options.retain_only_adapter else None,
    )
    emitted = EmittedAdapter(*read_adapter(options.adapter), provenance)
    emitted.scaled(found.strength).with_calibration(found).save(options.output)
    draw_calibration(found, Path(options.output) / PICTURE_NAME)
    print(f"{found}\nThe adapter at that strength is in {options.output}, its curve in {PICTURE_NAME} there")
    print(f"Next: peft-perta verify {options.output} --base {options.model}")


def _checked(named: dict[str, str | None]) -> dict[str, str]:
    """Name -> adapter directory of those that are given, their files in order."""
    given = {name: directory for name, directory in named.items() if directory}
    for directory in given.values():
        check_adapter_files(directory)
    check_distinct(directory for name, directory in given.items() if name not in ("forget", "retain-only"))
    return given


def _searched(options: argparse.Namespace, named: dict[str, str]) -> tuple[PeftModel, Goal, dict[str, list[Sample]]]:
    """The model with these adapters, the goal and the samples that a search for a strength takes."""
    target_forget_loss = options.target_forget_loss
    if options.retain_only_log:
        target_forget_loss = forget_loss_of_log(options.retain_only_log)
    if not options.retain_only_adapter:
        Goal(target_forget_loss, options.retain_tolerance)
    rows = {name: read_rows(getattr(options, name)) for name in ("forget", "retain")}
    base, tokenizer = load_model(options)
    samples = {
        name: load_samples(found, tokenizer, max_length=options.max_length, name=f"the {name} set")
        for name, found in rows.items()
    }
    model = attach_adapters(base, named)
    if options.retain_only_adapter:
        target_forget_loss = float(losses_of(model, samples["forget"], adapters=["retain-only"]).double().mean())
    return model, Goal(target_forget_loss, options.retain_tolerance), samples


def _extrapolate(options: argparse.Namespace) -> None:
    check_output(options.output, PROVENANCE_NAME)
    ways = {"unlearn": options.adapter, "start": options.start_adapter}
    if options.alpha != "auto":
        goal = ("forget", "retain", "task_adapter", "target_forget_loss", "retain_only_log", "retain_only_adapter",
                "retain_tolerance")  # fmt: skip
        given = next((name for name in goal if getattr(options, name) is not None), None)
        if given:
            raise ConfigError(
                f"--{given.replace('_', '-')}: expected none with --alpha {options.alpha:g}, for which nothing is "
                "searched; leave one of the two out"
            )
        model = attach_adapters(load_skeleton(options.model, revision=options.revision), _checked(ways))
        searched = {}
    else:
        for name in ("forget", "retain"):
            if not getattr(options, name):
                raise DataError(f"--{name}: expected a file of rows to judge by, found none; or give --alpha a number")
        named = _checked({**ways, "task": options.task_adapter, "retain-only": options.retain_only_adapter})
        model, goal, samples = _searched(options, named)
        searched = {"goal": goal, **samples, "with_adapters": ["task"] if options.task_adapter else []}
    lora_config, state_dict, provenance = extrapolate_adapter(
        model, "unlearn", options.alpha, start_adapter="start" if options.start_adapter else None, **searched
    )
    save_perta_adapter(options.output, lora_config, state_dict, provenance)
    if provenance.calibration is not None:
        found = Calibration.from_dict(provenance.calibration)
        draw_calibration(found, Path(options.output) / PICTURE_NAME)
        print(f"{found}\nIts curve is in {Path(options.output) / PICTURE_NAME}")
    print(f"{provenance}\nIt is in {options.output}")
    print(f"Next: peft-perta verify {options.output} --base {options.model}")
