"""``peft-perta``: parse, call, print. Exit status 0; 1 where ``verify`` finds a fault; 2, with one clear
line, where the input is at fault."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import processes
from .adapter import (
    FORGET_RECORD_NAME,
    PROVENANCE_NAME,
    check_adapter_files,
    hash_file,
    load_provenance,
    read_adapter,
    save_perta_adapter,
    scaled_adapter,
    torch_dtype,
)
from .calibration import Calibration, Goal, calibrate, forget_loss_of_log
from .checkpoint import remove_checkpoint
from .config import ALLOCATIONS, DTYPES, FIT_NAMES, GRANULARITY_NAMES, REFERENCE_MODELS, PerTAConfig
from .data import load_samples, read_rows
from .demo import DemoSettings, run_demo
from .errors import AdapterError, ConfigError, DataError, PerTAError
from .evaluation import losses_of
from .fuse import fuse_adapters
from .loading import attach_adapters, load_base, load_skeleton, quiet
from .merge import compare_merged, merge_adapters
from .methods import get_perta_state_dict
from .output import check_output
from .picture import PICTURE_NAME, draw_calibration
from .report import FusedReport, PerTAReport
from .training import train_forget_adapter
from .training.forget_adapter import default_lora_config
from .verification import format_checks, re_evaluate, verify_adapter
from .weightings import WEIGHTINGS, resolve_weighting

ROWS_HELP = "JSON lines of {question, answer}, {prompt, completion}, {messages} or {text}"
CHOICES = {"granularity": GRANULARITY_NAMES, "fit": FIT_NAMES, "allocation": ALLOCATIONS,
           "reference_model": REFERENCE_MODELS, "dtype": DTYPES}  # fmt: skip
BARS = " ▁▂▃▄▅▆▇█"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our bars shows something else, and goes on
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status or 0
    except PerTAError as error:
        if processes.local_rank() == 0:  # the others fail with it
            print(f"peft-perta: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        begun = options.run is _unlearn and os.path.exists(_checkpoint(options))
        left = "the same command goes on from here" if begun else "nothing was written"
        print(f"peft-perta: interrupted; {left}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-perta",
        description="Take knowledge out of a language model with a LoRA adapter: train a forget adapter on what must "
        "go, weigh it parameter by parameter, and get a negative adapter that stacks on the full model.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(
        commands, "demo", _demo, "run the main job on TOFU with the small Llama that ships with the package"
    )
    demo.add_argument("--four-bit", action="store_true", help="quantise the base to NF4")
    demo.add_argument("--output", metavar="DIR", help="default: perta_demo, or perta_demo_4bit with --four-bit")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the forget adapter's training (default: 0)")

    forget = _command(commands, "forget", _forget, "train a forget adapter on what must go (LoRA or QLoRA, by TRL)")
    _add_model(forget)
    forget.add_argument("--forget", required=True, metavar="ROWS", help=f"what must go: {ROWS_HELP}")
    forget.add_argument("--output", required=True, metavar="DIR", help="directory of the forget adapter")
    forget.add_argument("--rank", type=int, default=16, help="LoRA rank; lora_alpha is twice that (default: 16)")
    forget.add_argument("--epochs", type=float, default=10, help="passes over the rows (default: 10)")
    forget.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default: 0.001)")
    forget.add_argument("--batch-size", type=int, default=8, help="rows per step (default: 8)")
    forget.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    forget.add_argument("--seed", type=_seed, default=0, help="seed of init and order (default: 0)")

    unlearn = _command(commands, "unlearn", _unlearn, "forget adapter + forget rows + retain rows -> negative adapter")
    _add_model(unlearn)
    unlearn.add_argument("--forget-adapter", required=True, metavar="DIR", help="LoRA trained on the forget rows alone")
    unlearn.add_argument(
        "--task-adapter", metavar="DIR", help="the adapter that knows too much; used with --reference-model full"
    )
    unlearn.add_argument("--forget", metavar="ROWS", help=f"what must go: {ROWS_HELP}")
    unlearn.add_argument("--retain", metavar="ROWS", help="what must stay, likewise")
    unlearn.add_argument("--output", required=True, metavar="DIR", help="directory of the negative adapter")
    for field in dataclasses.fields(PerTAConfig):
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        if field.name not in _TYPES:
            unlearn.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
            continue
        default = "" if field.default is None else f" (default: {field.default})"
        choices = CHOICES.get(field.name)
        unlearn.add_argument(name, type=_TYPES[field.name], default=field.default, choices=choices, help=text + default)

    calibrate = _command(commands, "calibrate", _calibrate, "find the strength that meets a goal, and rescale")
    _add_model(calibrate)
    calibrate.add_argument("--adapter", required=True, metavar="DIR", help="a negative adapter that unlearn wrote")
    calibrate.add_argument("--task-adapter", metavar="DIR", help="the adapter that knows too much, where it is one")
    calibrate.add_argument("--forget", required=True, metavar="ROWS", help=f"rows to forget: {ROWS_HELP}")
    calibrate.add_argument("--retain", required=True, metavar="ROWS", help="rows to keep that gave no gradients")
    goal = calibrate.add_mutually_exclusive_group(required=True)
    goal.add_argument("--forget-loss", type=float, help="match this mean forget loss (nats per token)")
    goal.add_argument("--reference-log", metavar="JSON", help="match that of a retain-only model's TOFU_EVAL.json")
    goal.add_argument("--reference-adapter", metavar="DIR", help="match that of the base with this adapter on")
    goal.add_argument(
        "--retain-tolerance", type=float, help="the most forgetting that raises the retain loss by no more than this"
    )
    calibrate.add_argument("--forget-adapter", metavar="DIR", help="draw its plain negation beside")
    calibrate.add_argument("--max-length", type=int, default=1024, help="tokens per row (default: 1024)")
    calibrate.add_argument("--output", required=True, metavar="DIR", help="directory of the rescaled adapter")

    fuse = _command(commands, "fuse", _fuse, "several adapters as one, for servers that take one a request")
    fuse.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help="plain LoRA adapters of one base")
    fuse.add_argument("--model", required=True, metavar="NAME", help="their base; its weights are not loaded")
    fuse.add_argument("--revision", help="revision of a hub model")
    fuse.add_argument("--rank", type=int, help="truncate to this rank (default: the ranks' sum, exactly)")
    fuse.add_argument("--dtype", choices=DTYPES, default="float32", help="of the factors (default: float32)")
    fuse.add_argument("--output", required=True, metavar="DIR", help="directory of the fused adapter")

    merge = _command(commands, "merge", _merge, "adapters into a full-precision copy of the base, shard by shard")
    merge.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help="plain LoRA adapters of the base")
    merge.add_argument("--model", required=True, metavar="NAME", help="the base, not quantised")
    merge.add_argument("--revision", help="revision of a hub model")
    merge.add_argument("--dtype", choices=DTYPES, help="of the merged model (default: as the base's files)")
    merge.add_argument("--check", metavar="ROWS", help="rows to compare the merged model's answers and losses on")
    merge.add_argument("--output", required=True, metavar="DIR", help="directory of the merged model")

    verify = _command(commands, "verify", _verify, "check an adapter's files, what servers ask of it, and its base")
    verify.add_argument("adapter", metavar="DIR", help="a directory that unlearn, calibrate or fuse wrote")
    verify.add_argument("--base", "--model", dest="model", metavar="NAME", help="load the adapter on it, afresh")
    verify.add_argument("--revision", help="revision of a hub model")
    verify.add_argument("--task-adapter", metavar="DIR", help="is on beside it when rows are re-evaluated")
    verify.add_argument("--forget", metavar="ROWS", help="re-evaluate on these rows, with the adapter off and on")
    verify.add_argument("--retain", metavar="ROWS", help="likewise")

    inspect = _command(commands, "inspect", _inspect, "say what an emitted adapter is and how it was made")
    inspect.add_argument("adapter", metavar="DIR", help="a directory that unlearn wrote")
    return parser


def _load_base(options: argparse.Namespace):
    return load_base(options.model, four_bit=options.four_bit, revision=options.revision, device_map=options.device_map)


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="NAME", help="base model: a hub name or a directory")
    command.add_argument("--revision", help="revision of a hub model")
    command.add_argument("--four-bit", action="store_true", help="quantise the base to NF4 (QLoRA)")
    command.add_argument(
        "--device-map", choices=["auto"], help="spread the layers over all GPUs and the host (default: one GPU)"
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


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):  # what NumPy's generator takes
        raise argparse.ArgumentTypeError(f"expected an int from 0 to {2**32 - 1}, found {text!r}")
    return int(text)


_TYPES = {
    "weighting": str,
    "granularity": str,
    "power": float,
    "rank": _rank,
    "allocation": str,
    "fit": str,
    "strength": _strength,
    "forget_loss": float,
    "retain_tolerance": float,
    "divergence_samples": int,
    "reference_model": str,
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
    model, tokenizer = _load_base(options)
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
    processes.start()
    check_output(options.output, PROVENANCE_NAME)
    adapters = {"forget": options.forget_adapter}
    if options.task_adapter:
        adapters["task"] = options.task_adapter
    for directory in adapters.values():
        check_adapter_files(directory)
    sets = [read_rows(path) if path else None for path in (options.forget, options.retain)]
    base, tokenizer = _load_base(options)
    model = attach_adapters(base, adapters)
    lora_config, state_dict, report = get_perta_state_dict(
        model,
        config,
        *sets,
        task_adapter="task" if options.task_adapter else None,
        tokenizer=tokenizer,
        checkpoint_dir=_checkpoint(options),
    )
    if processes.is_main():
        save_perta_adapter(options.output, lora_config, state_dict, report)
        remove_checkpoint(_checkpoint(options))
        print(f"{report}\nIt is in {options.output}")
        if report.calibration is not None:
            found = Calibration.from_dict(report.calibration)
            draw_calibration(found, Path(options.output) / PICTURE_NAME)
            print(f"{found}\nIts curve is in {Path(options.output) / PICTURE_NAME}")
        print(f"Next: peft-perta verify {options.output} --base {options.model}, then stack it on the model")
    processes.finish()


def _checkpoint(options: argparse.Namespace) -> str:
    """Where an interrupted ``unlearn`` leaves what it has."""
    return f"{options.output.rstrip(os.sep)}.checkpoint"


def _calibrate(options: argparse.Namespace) -> None:
    check_output(options.output, PROVENANCE_NAME)
    named = {
        "unlearn": options.adapter,
        "task": options.task_adapter,
        "forget": options.forget_adapter,
        "reference": options.reference_adapter,
    }
    named = {name: directory for name, directory in named.items() if directory}
    for directory in named.values():
        check_adapter_files(directory)
    report, _ = load_provenance(options.adapter)
    if not isinstance(report, PerTAReport):
        raise AdapterError(f"{options.adapter} is a fused adapter; calibrate the parts, then fuse them")
    forget_loss = options.forget_loss
    if options.reference_log:
        forget_loss = forget_loss_of_log(options.reference_log)
    if not options.reference_adapter:
        Goal(forget_loss, options.retain_tolerance)
    rows = {name: read_rows(getattr(options, name)) for name in ("forget", "retain")}
    base, tokenizer = _load_base(options)
    samples = {
        name: load_samples(found, tokenizer, max_length=options.max_length, name=f"the {name} set")
        for name, found in rows.items()
    }
    model = attach_adapters(base, named)
    if options.reference_adapter:
        forget_loss = float(losses_of(model, samples["forget"], adapters=["reference"]).double().mean())
    found = calibrate(
        model,
        Goal(forget_loss, options.retain_tolerance),
        samples["forget"],
        samples["retain"],
        adapter_name="unlearn",
        with_adapters=["task"] if options.task_adapter else [],
        negated_adapter="forget" if options.forget_adapter else None,
        reference=["reference"] if options.reference_adapter else None,
    )
    lora_config, state_dict = read_adapter(options.adapter)
    state_dict, report = scaled_adapter(state_dict, report, found.strength)
    report = dataclasses.replace(report, calibration=found.to_dict())
    save_perta_adapter(options.output, lora_config, state_dict, report)
    draw_calibration(found, Path(options.output) / PICTURE_NAME)
    print(f"{found}\nThe adapter at that strength is in {options.output}, its curve in {PICTURE_NAME} there")
    print(f"Next: peft-perta verify {options.output} --base {options.model}")


def _parts(texts: Sequence[str]) -> dict[str, float]:
    """DIR[:STRENGTH] -> strength."""
    parts: dict[str, float] = {}
    for text in texts:
        directory, colon, strength = text.rpartition(":")
        if not colon or os.path.isdir(text):
            directory, strength = text, "1"
        try:
            value = float(strength)
        except ValueError:
            raise ConfigError(f"expected DIR or DIR:STRENGTH with a number, found {text!r}") from None
        if directory in parts or not math.isfinite(value):
            what = "is given twice" if directory in parts else f"has the strength {value}, expected a finite one"
            raise ConfigError(f"{directory} {what}")
        parts[directory] = value
    for directory in parts:
        check_adapter_files(directory)
    return parts


def _fuse(options: argparse.Namespace) -> None:
    check_output(options.output, PROVENANCE_NAME)
    parts = _parts(options.adapters)
    names = [Path(directory).name.replace(".", "_") for directory in parts]
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names, start=1)]
    directories = dict(zip(names, parts, strict=True))
    model = attach_adapters(load_skeleton(options.model, revision=options.revision), directories)
    strengths = dict(zip(names, parts.values(), strict=True))
    dtype = torch_dtype(options.dtype)
    lora_config, state_dict, report = fuse_adapters(model, strengths, rank=options.rank, dtype=dtype)
    save_perta_adapter(options.output, lora_config, state_dict, report)
    print(f"{report}\nIt is in {options.output}")
    print(f"Next: peft-perta verify {options.output} --base {options.model}, then serve it alone")


def _merge(options: argparse.Namespace) -> None:
    parts = _parts(options.adapters)
    rows = read_rows(options.check) if options.check else None
    dtype = torch_dtype(options.dtype) if options.dtype else None
    report = merge_adapters(options.model, parts, options.output, dtype=dtype, revision=options.revision)
    print(f"{report}\nThe model is in {options.output}; it loads without PEFT")
    if rows is not None:
        print(compare_merged(options.model, parts, options.output, rows, revision=options.revision))


def _verify(options: argparse.Namespace) -> int:
    rows = {name: read_rows(getattr(options, name)) for name in ("forget", "retain") if getattr(options, name)}
    if rows and not options.model:
        raise ConfigError("--forget and --retain need --base: the model to re-evaluate on")
    checks = verify_adapter(options.adapter, options.model, revision=options.revision)
    if rows and all(check.passed for check in checks):
        base, tokenizer = load_base(options.model, revision=options.revision)
        named = {"task": options.task_adapter, "unlearn": options.adapter}
        model = attach_adapters(base, {name: directory for name, directory in named.items() if directory})
        samples = {name: load_samples(found, tokenizer, name=f"the {name} set") for name, found in rows.items()}
        checks += re_evaluate(model, samples, "unlearn", ["task"] if options.task_adapter else [])
    print(format_checks(checks))
    return 0 if all(check.passed for check in checks) else 1


def _inspect(options: argparse.Namespace) -> None:
    report, files = load_provenance(options.adapter)
    check_adapter_files(options.adapter)
    if isinstance(report, FusedReport):
        print("\n".join([str(report), *_states(Path(options.adapter), files)]))
        return
    try:
        lines = [str(report), _facts(report), *_states(Path(options.adapter), files), "", *_layers(report)]
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise AdapterError(
            f"{options.adapter}: {PROVENANCE_NAME} is damaged ({type(error).__name__}: {error}); emit the adapter anew"
        ) from error
    print("\n".join(lines))


def _states(directory: Path, files: dict[str, str]) -> Iterator[str]:
    for name, digest in files.items():
        state = "as emitted" if hash_file(directory / name) == digest else "CHANGED since it was emitted"
        yield f"{name:<28}{state}"


def _layers(report: PerTAReport) -> Iterator[str]:
    width = max(len(layer.name) for layer in report.layers)
    yield f"{'layer':<{width}}{'rank':>6}{'norm':>9}{'energy':>8}  weights: mean (5 % .. 95 %), 0 {'·' * 8} 1"
    for layer in report.layers:
        spread = "   ".join(
            f"{key} {w.mean:.2f} ({w.quantiles[0]:.2f}..{w.quantiles[-1]:.2f}) [{_bars(w.histogram)}]"
            for key, w in layer.weights.items()
        )
        yield f"{layer.name:<{width}}{layer.rank:>6}{layer.edit_norm:>9.3f}{layer.energy_kept:>8.1%}  {spread}"


def _facts(report: PerTAReport) -> str:
    base = report.base_model
    quantization = (base["quantization"] or {}).get("quant_method", "none")
    lines = {
        "base": f"{base['name']} (revision {base['revision'] or 'unknown'}, quantisation {quantization})",
        "forget adapter": f"{report.forget_adapter['name']} {report.forget_adapter['sha256'][:16]}",
        **{f"{name} set": f"{entry['samples']} samples {entry['sha256'][:16]}" for name, entry in report.data.items()},
        "power": report.config["power"] if report.config["power"] is not None else _own_power(report),
        "gradients at": report.config["reference_model"],
        "made with": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    return "\n".join(f"{name:<28}{value}" for name, value in lines.items())


def _own_power(report: PerTAReport) -> str:
    weighting = WEIGHTINGS.get(report.config["weighting"])
    return f"{weighting.power:g} (the weighting's own)" if weighting and weighting.function else "-"


def _bars(histogram: list[int]) -> str:
    """Counts as ten bars, the largest the highest."""
    pairs = [histogram[i] + histogram[i + 1] for i in range(0, len(histogram), 2)]
    top = max(pairs) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in pairs)
