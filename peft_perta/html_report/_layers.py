"""Weights and energy kept over the model's depth, as tables whose cells are coloured beside their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..adapters import LayerProvenance, PerTAProvenance
from ._markup import Markup, element, join
from ._parts import DASH, scrolling

STEPS = 11  # shades, from 0 to 1


MOST_ROWS = 40  # deeper models have several blocks in a row


_FLAT = 0.0005  # values that all show as the same number are said in a sentence, not drawn


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its block (None outside of the blocks) and its kind of module."""

    depth: int | None
    module: str


def place_of(name: str) -> Place:
    """``model.layers.3.mlp.experts.7.down_proj`` is ``mlp.experts.down_proj`` of block 3 of ``model.layers``."""
    parts = re.sub(r"\[\d+\]$", "", name).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return Place(None, name)
    words = [part for part in parts[first + 1 :] if not part.isdecimal()]
    stack = ".".join(parts[:first])
    return Place(int(parts[first]), f"{stack}:{'.'.join(words)}")


def heat_maps(report: PerTAProvenance) -> Markup:
    """One map for each kind of weights, and one of the energy kept; mean over the layers of a cell."""
    kinds = list(dict.fromkeys(key for layer in report.layers for key in layer.weights))
    maps: list[tuple[str, Callable[[LayerProvenance], float | None]]] = [
        (f"Mean weight{_of(kind)}", lambda layer, kind=kind: _mean(layer, kind)) for kind in kinds
    ]
    maps.append(("Energy of the edit kept", lambda layer: layer.energy_kept))
    drawn, said = [], []
    for title, value in maps:
        values = [found for layer in report.layers if (found := value(layer)) is not None]
        if values and max(values) - min(values) < _FLAT:
            said.append(f"{title}: {_shown(values[0])} in every layer (0 is nothing, 1 is all).")
        elif values:
            drawn.append(_map(title, report.layers, value))
    notes = [element("p", text) for text in said]
    return join(*([_scale(), element("div", *drawn, class_="maps")] if drawn else []), *notes)


def _of(kind: str) -> str:
    return f" on {kind}"


def _mean(layer: LayerProvenance, kind: str) -> float | None:
    return layer.weights[kind].mean if kind in layer.weights else None


def _map(title: str, layers: Iterable[LayerProvenance], value: Callable[[LayerProvenance], float | None]) -> Markup:
    cells: dict[tuple[int | None, str], list[float]] = {}
    places = [(place_of(layer.name), value(layer)) for layer in layers]
    deepest = max((place.depth for place, _ in places if place.depth is not None), default=0)
    blocks = -(-(deepest + 1) // MOST_ROWS)
    for place, found in places:
        if found is not None:
            row = None if place.depth is None else place.depth // blocks
            cells.setdefault((row, place.module), []).append(found)
    modules = list(dict.fromkeys(place.module for place, _ in places))
    rows = sorted({row for row, _ in cells if row is not None})
    names = _short(modules)
    head = element("tr", element("td"), *(element("th", _breakable(names[module]), scope="col") for module in modules))
    body = [_row(_blocks(row, blocks, deepest), row, modules, cells) for row in rows]
    if any(row is None for row, _ in cells):
        body.append(_row("others", None, modules, cells))
    label = f"{title}, by block and module"
    written = element(
        "table", element("caption", title), element("thead", head), element("tbody", *body), class_="heat"
    )
    return scrolling(written, label)


def _row(name: str, row: int | None, modules: list[str], cells: dict[tuple[int | None, str], list[float]]) -> Markup:
    return element("tr", element("th", name, scope="row"), *(_cell(cells.get((row, module))) for module in modules))


def _cell(values: list[float] | None) -> Markup:
    if not values:
        return element("td", element("span", "not edited", class_="spoken"))
    mean = sum(values) / len(values)
    return element("td", element("data", _shown(mean), value=repr(mean)), class_=f"h{shade(mean)}")


def shade(value: float) -> int:
    """0 to 1 -> 0 to STEPS - 1."""
    return min(max(int(value * STEPS), 0), STEPS - 1)


def _shown(value: float) -> str:
    """Three digits: '.997', and 1 only where it is 1."""
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else ".999" if value < 1 else "1"


def _blocks(row: int, size: int, deepest: int) -> str:
    return f"{row}" if size == 1 else f"{row * size}{DASH}{min(row * size + size - 1, deepest)}"


def _short(modules: list[str]) -> dict[str, str]:
    """The fewest last words of each name that tell them all apart."""
    split = {module: re.split(r"[.:]", module) for module in modules}
    for words in range(1, max(map(len, split.values())) + 1):
        names = {module: ".".join(parts[-words:]) for module, parts in split.items()}
        if len(set(names.values())) == len(names):
            return names
    return {module: module for module in modules}


def _breakable(name: str) -> Markup:
    """A line may end after each '_' and '.'."""
    parts = re.split(r"(?<=[_.])", name)
    return join(*(part if i == 0 else join(element("wbr"), part) for i, part in enumerate(parts)))


def _scale() -> Markup:
    swatches = (element("span", class_=f"h{step}") for step in range(STEPS))
    return element("p", element("span", "0 "), element("span", *swatches, class_="swatches", aria_hidden="true"), " 1",
                   class_="scale")  # fmt: skip
