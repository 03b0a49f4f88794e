"""``peft-perta``: parse, call, print. Exit status 0, or 2 with one clear line where the input is at fault."""

from __future__ import annotations

import argparse
import dataclasses
import io
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
    save_perta_adapter,
)
from .checkpoint import remove_checkpoint
from .config import DTYPES, FIT_NAMES, GRANULARITY_NAMES, REFERENCE_MODELS, PerTAConfig
from .data import read_rows
from .demo import DemoSettings, run_demo
from .errors import AdapterError, ConfigError, DataError, PerTAError
from .loading import attach_adapters, load_base, quiet
from .methods import get_perta_state_dict
from .output import check_output
from .report import PerTAReport
from .training import train_forget_adapter
from .training.forget_adapter import default_lora_config
from .weightings import WEIGHTINGS, resolve_weighting

ROWS_HELP = "JSON lines of {question, answer}, {prompt, completion}, {messages} or {text}"
CHOICES = {"granularity": GRANULARITY_NAMES, "fit": FIT_NAMES, "reference_model": REFERENCE_MODELS, "dtype": DTYPES}
BARS = " ▁▂▃▄▅▆▇█"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our bars shows something else, and goes on
    try:
        options.run(options)
        sys.stdout.flush()
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
    commands = parser.add_subparsers(title="commands", required=True, metavar="{demo,forget,unlearn,inspect}")

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
    "fit": str,
    "strength": _strength,
    "forget_loss": float,
    "retain_tolerance": float,
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
        print(f"Next: peft-perta inspect {options.output}, then stack it on the model")
    processes.finish()


def _checkpoint(options: argparse.Namespace) -> str:
    """Where an interrupted ``unlearn`` leaves what it has."""
    return f"{options.output.rstrip(os.sep)}.checkpoint"


def _inspect(options: argparse.Namespace) -> None:
    report, files = load_provenance(options.adapter)
    check_adapter_files(options.adapter)
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
