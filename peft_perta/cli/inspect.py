r"""Show what an adapter is, how it was made, and whether its files are as they were written. It needs a directory that
a command of peft-perta wrote.

Example:
  peft-perta inspect unlearn_adapter
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..adapters import PerTAProvenance, Provenance, load_provenance
from ..model import check_adapter_files, find_adapter, hash_file
from ..perta import WEIGHTINGS

BARS = " ▁▂▃▄▅▆▇█"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", metavar="DIR", help="a directory that a command of peft-perta wrote")


def run(options: argparse.Namespace) -> None:
    """Print the provenance; of a negative adapter also each layer."""
    provenance, files = load_provenance(options.adapter)
    check_adapter_files(options.adapter)
    print("\n".join(_lines(provenance, find_adapter(options.adapter), files)))


def _lines(provenance: Provenance, directory: Path, files: dict[str, str]) -> Iterator[str]:
    yield str(provenance)
    if isinstance(provenance, PerTAProvenance):
        yield _facts(provenance)
    for name, digest in files.items():
        state = "as emitted" if hash_file(directory / name) == digest else "CHANGED since it was emitted"
        yield f"{name:<28}{state}"
    if isinstance(provenance, PerTAProvenance):
        yield ""
        yield from _layers(provenance)


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
    quantization = (base.get("quantization") or {}).get("quant_method", "none")
    lines = {
        "base": f"{base['name']} (revision {base.get('revision') or 'unknown'}, quantisation {quantization})",
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
    """Ten bars, each of two neighbouring counts; the largest count has the highest bar."""
    pairs = [histogram[i] + histogram[i + 1] for i in range(0, len(histogram), 2)]
    top = max(pairs) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in pairs)
