"""From a negative adapter to a server: ``fuse``, ``merge``, ``verify``, ``inspect``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..adapters import (
    DTYPES,
    PROVENANCE_NAME,
    PerTAProvenance,
    compare_merged,
    format_checks,
    fuse_adapters,
    load_provenance,
    merge_adapters,
    re_evaluate,
    save_perta_adapter,
    torch_dtype,
    verify_adapter,
)
from ..data import check_output, load_samples, read_rows
from ..errors import AdapterError, ConfigError
from ..model import attach_adapters, check_adapter_files, hash_file, load_base, load_skeleton
from ..perta import WEIGHTINGS
from ._options import add_command, strengths_of

BARS = " ▁▂▃▄▅▆▇█"


def add_commands(commands) -> None:
    fuse = add_command(commands, "fuse", _fuse, "several adapters as one, for servers that take one a request")
    fuse.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help="plain LoRA adapters of one base")
    fuse.add_argument("--model", required=True, metavar="NAME", help="their base; its weights are not loaded")
    fuse.add_argument("--revision", help="revision of a hub model")
    fuse.add_argument("--rank", type=int, help="truncate to this rank (default: the ranks' sum, exactly)")
    fuse.add_argument("--dtype", choices=DTYPES, default="float32", help="of the factors (default: float32)")
    fuse.add_argument("--output", required=True, metavar="DIR", help="directory of the fused adapter")

    merge = add_command(commands, "merge", _merge, "adapters into a full-precision copy of the base, shard by shard")
    merge.add_argument("adapters", nargs="+", metavar="DIR[:STRENGTH]", help="plain LoRA adapters of the base")
    merge.add_argument("--model", required=True, metavar="NAME", help="the base, not quantised")
    merge.add_argument("--revision", help="revision of a hub model")
    merge.add_argument("--dtype", choices=DTYPES, help="of the merged model (default: as the base's files)")
    merge.add_argument("--check", metavar="ROWS", help="rows to compare the merged model's answers and losses on")
    merge.add_argument("--output", required=True, metavar="DIR", help="directory of the merged model")

    verify = add_command(commands, "verify", _verify, "check an adapter's files, what servers ask of it, and its base")
    verify.add_argument("adapter", metavar="DIR", help="a directory that unlearn, calibrate or fuse wrote")
    verify.add_argument("--base", "--model", dest="model", metavar="NAME", help="load the adapter on it, afresh")
    verify.add_argument("--revision", help="revision of a hub model")
    verify.add_argument("--task-adapter", metavar="DIR", help="is on beside it when rows are re-evaluated")
    verify.add_argument("--forget", metavar="ROWS", help="re-evaluate on these rows, with the adapter off and on")
    verify.add_argument("--retain", metavar="ROWS", help="likewise")

    inspect = add_command(commands, "inspect", _inspect, "say what an emitted adapter is and how it was made")
    inspect.add_argument("adapter", metavar="DIR", help="a directory that unlearn wrote")


def _fuse(options: argparse.Namespace) -> None:
    check_output(options.output, PROVENANCE_NAME)
    parts = strengths_of(options.adapters)
    names = [Path(directory).name.replace(".", "_") for directory in parts]
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names, start=1)]
    directories = dict(zip(names, parts, strict=True))
    model = attach_adapters(load_skeleton(options.model, revision=options.revision), directories)
    strengths = dict(zip(names, parts.values(), strict=True))
    dtype = torch_dtype(options.dtype)
    lora_config, state_dict, provenance = fuse_adapters(model, strengths, rank=options.rank, dtype=dtype)
    save_perta_adapter(options.output, lora_config, state_dict, provenance)
    print(f"{provenance}\nIt is in {options.output}")
    print(f"Next: peft-perta verify {options.output} --base {options.model}, then serve it alone")


def _merge(options: argparse.Namespace) -> None:
    parts = strengths_of(options.adapters)
    rows = read_rows(options.check) if options.check else None
    dtype = torch_dtype(options.dtype) if options.dtype else None
    provenance = merge_adapters(options.model, parts, options.output, dtype=dtype, revision=options.revision)
    print(f"{provenance}\nThe model is in {options.output}; it loads without PEFT")
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
    provenance, files = load_provenance(options.adapter)
    check_adapter_files(options.adapter)
    if not isinstance(provenance, PerTAProvenance):
        print("\n".join([str(provenance), *_states(Path(options.adapter), files)]))
        return
    try:
        lines = [str(provenance), _facts(provenance), *_states(Path(options.adapter), files), "", *_layers(provenance)]
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise AdapterError(
            f"{options.adapter}: {PROVENANCE_NAME} is damaged ({type(error).__name__}: {error}); emit the adapter anew"
        ) from error
    print("\n".join(lines))


def _states(directory: Path, files: dict[str, str]) -> Iterator[str]:
    for name, digest in files.items():
        state = "as emitted" if hash_file(directory / name) == digest else "CHANGED since it was emitted"
        yield f"{name:<28}{state}"


def _layers(provenance: PerTAProvenance) -> Iterator[str]:
    width = max(len(layer.name) for layer in provenance.layers)
    yield f"{'layer':<{width}}{'rank':>6}{'norm':>9}{'energy':>8}  weights: mean (5 % .. 95 %), 0 {'·' * 8} 1"
    for layer in provenance.layers:
        spread = "   ".join(
            f"{key} {w.mean:.2f} ({w.quantiles[0]:.2f}..{w.quantiles[-1]:.2f}) [{_bars(w.histogram)}]"
            for key, w in layer.weights.items()
        )
        yield f"{layer.name:<{width}}{layer.rank:>6}{layer.edit_norm:>9.3f}{layer.energy_kept:>8.1%}  {spread}"


def _facts(provenance: PerTAProvenance) -> str:
    base = provenance.base_model
    quantization = (base["quantization"] or {}).get("quant_method", "none")
    lines = {
        "base": f"{base['name']} (revision {base['revision'] or 'unknown'}, quantisation {quantization})",
        "forget adapter": f"{provenance.forget_adapter['name']} {provenance.forget_adapter['sha256'][:16]}",
        **{
            f"{name} set": f"{entry['samples']} samples {entry['sha256'][:16]}"
            for name, entry in provenance.data.items()
        },
        "power": provenance.config["power"] if provenance.config["power"] is not None else _own_power(provenance),
        "gradients at": provenance.config["gradients_at"],
        "made with": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }
    return "\n".join(f"{name:<28}{value}" for name, value in lines.items())


def _own_power(provenance: PerTAProvenance) -> str:
    weighting = WEIGHTINGS.get(provenance.config["weighting"])
    return f"{weighting.power:g} (the weighting's own)" if weighting and weighting.function else "-"


def _bars(histogram: list[int]) -> str:
    """Counts as ten bars, the largest the highest."""
    pairs = [histogram[i] + histogram[i + 1] for i in range(0, len(histogram), 2)]
    top = max(pairs) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in pairs)
