"""The section on layers: mean weights and energy kept, by block and module.

The maps are tables whose cells hold a number and a colour that follows the number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..adapters import LayerProvenance, PerTAProvenance, Provenance
from ._elements import missing, scrolling, section
from ._html import Markup, element, join
from ._numbers import EN_DASH
from ._remedies import UNLEARN

SHADES = 11  # of colour, from 0 to 1
MAX_ROWS = 40  # a deeper model gets several blocks per row
_EQUAL = 0.0005  # values that differ by less all read the same: one sentence replaces their map

Cells = dict[tuple[int | None, str], list[float]]  # (row or None outside the blocks, module) -> values of its layers


@dataclass(frozen=True)
class Position:
    """Where a layer is in the model.

    Attributes:
        block: the number of its block; None outside the blocks.
        module: the stack of blocks and the module in the block, such as ``model.layers:self_attn.q_proj``.
    """

    block: int | None
    module: str


def layers_section(provenance: Provenance | None) -> Markup:
    """A map of each kind of weights, and one of the energy kept."""
    heading = "Layers"
    if not isinstance(provenance, PerTAProvenance):
        reason = "Only the provenance of an adapter from peft-perta unlearn records weights and energy for each layer."
        return section("layers", heading, element("p", reason) if provenance else missing(reason, UNLEARN))
    introduction = element(
        "p", "A weight is the share of a parameter's edit that stays: near 1 if the parameter matters to the forget "
        "rows, near 0 if it matters to the retain rows. Each row of a map is a block of the model, the first block on "
        "top; each column is a module. A cell is the mean over its layers. Energy kept is the share of the edit's "
        "squared norm that the rank of the adapter holds.",
    )  # fmt: skip
    return section("layers", heading, introduction, _maps(provenance))


def position_of(name: str) -> Position:
    """``model.layers.3.mlp.experts.7.down_proj`` is ``mlp.experts.down_proj`` in block 3 of ``model.layers``."""
    parts = re.sub(r"\[\d+\]$", "", name).split(".")
    first_number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if first_number is None:
        return Position(None, name)
    module = ".".join(part for part in parts[first_number + 1 :] if not part.isdecimal())
    return Position(int(parts[first_number]), f"{'.'.join(parts[:first_number])}:{module}")


def shade_of(value: float) -> int:
    """The number of the shade, 0 to ``SHADES`` - 1, for a value in [0, 1]."""
    return min(max(int(value * SHADES), 0), SHADES - 1)


def _maps(provenance: PerTAProvenance) -> Markup:
    layers = provenance.layers
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer.weights))
    quantities: list[tuple[str, Callable[[LayerProvenance], float | None]]] = [
        (f"Mean weight on {kind}", lambda layer, kind=kind: _mean_weight(layer, kind)) for kind in kinds
    ]
    quantities.append(("Energy of the edit kept", lambda layer: layer.energy_kept))
    maps, sentences = [], []
    for title, value_of in quantities:
        values = [value for layer in layers if (value := value_of(layer)) is not None]
        if values and max(values) - min(values) < _EQUAL:
            sentences.append(f"{title}: {_rounded(values[0])} in every layer (on a scale from 0 to 1).")
        elif values:
            maps.append(_map(title, [(position_of(layer.name), value_of(layer)) for layer in layers]))
    drawn = [_scale(), element("div", *maps, class_="maps")] if maps else []
    return join(*drawn, *(element("p", sentence) for sentence in sentences))


def _mean_weight(layer: LayerProvenance, kind: str) -> float | None:
    return layer.weights[kind].mean if kind in layer.weights else None


def _map(title: str, values: list[tuple[Position, float | None]]) -> Markup:
    modules = list(dict.fromkeys(position.module for position, _ in values))
    last_block = max((position.block for position, _ in values if position.block is not None), default=0)
    blocks_per_row = -(-(last_block + 1) // MAX_ROWS)
    cells: Cells = {}
    for position, value in values:
        if value is not None:
            row = None if position.block is None else position.block // blocks_per_row
            cells.setdefault((row, position.module), []).append(value)
    names = _shortest_names(modules)
    head = element("tr", element("td"), *(element("th", _breakable(names[module]), scope="col") for module in modules))
    rows = sorted({row for row, _ in cells if row is not None})
    body = [_row(_blocks(row, blocks_per_row, last_block), row, modules, cells) for row in rows]
    if any(row is None for row, _ in cells):
        body.append(_row("others", None, modules, cells))
    content = element(
        "table", element("caption", title), element("thead", head), element("tbody", *body), class_="map"
    )  # fmt: skip
    return scrolling(content, f"{title}, by block and module")


def _row(name: str, row: int | None, modules: list[str], cells: Cells) -> Markup:
    return element("tr", element("th", name, scope="row"), *(_cell(cells.get((row, module))) for module in modules))


def _cell(values: list[float] | None) -> Markup:
    if not values:
        return element("td", element("span", "not edited", class_="spoken"))
    mean = sum(values) / len(values)
    return element("td", element("data", _rounded(mean), value=repr(mean)), class_=f"h{shade_of(mean)}")


def _rounded(value: float) -> str:
    """Three digits, such as ".997"; "1" only if the value is 1."""
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else ".999" if value < 1 else "1"


def _blocks(row: int, blocks_per_row: int, last_block: int) -> str:
    """The numbers of the blocks in a row, such as "4" or "8-11"."""
    if blocks_per_row == 1:
        return f"{row}"
    return f"{row * blocks_per_row}{EN_DASH}{min((row + 1) * blocks_per_row - 1, last_block)}"


def _shortest_names(modules: list[str]) -> dict[str, str]:
    """The fewest last words of each module's name that tell the modules apart."""
    words = {module: re.split(r"[.:]", module) for module in modules}
    for count in range(1, max(map(len, words.values())) + 1):
        names = {module: ".".join(parts[-count:]) for module, parts in words.items()}
        if len(set(names.values())) == len(names):
            return names
    return {module: module for module in modules}


def _breakable(name: str) -> Markup:
    """A name that may wrap after each ``_`` and ``.``."""
    parts = re.split(r"(?<=[_.])", name)
    return join(*(part if place == 0 else join(element("wbr"), part) for place, part in enumerate(parts)))


def _scale() -> Markup:
    swatches = (element("span", class_=f"h{shade}") for shade in range(SHADES))
    return element("p", element("span", "0 "), element("span", *swatches, class_="swatches", aria_hidden="true"), " 1",
                   class_="scale")  # fmt: skip
