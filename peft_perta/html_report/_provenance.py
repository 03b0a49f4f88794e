"""The section on the edit: the stack of adapters, and how the last one was made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..adapters import FusedProvenance, PerTAProvenance, Provenance
from ._elements import Cell, facts, missing, section, table
from ._html import Markup, element, join
from ._numbers import number, share
from ._remedies import UNLEARN
from .report_data import ReportData, ReportHeader

_SETS = {
    "forget": "forget rows",
    "retain": "retain rows",
    "held-out retain": "retain rows held out for the search of the strength",
}

_GRADIENT_POINTS = {"origin": "origin model (every adapter off)", "full": "full model"}


def edit_section(data: ReportData, provenance: Provenance | None) -> Markup:
    """The stack of adapters, then the facts of the last adapter's provenance."""
    heading = "The edit"
    stack = _stack(data.header)
    if provenance is None:
        reason = "How the edit was made is not on record: no adapter with a provenance file of peft_perta was given."
        return section("edit", heading, facts(stack), missing(reason, UNLEARN))
    if isinstance(provenance, FusedProvenance):
        return section("edit", heading, *_fused(stack, provenance))
    sets = [(_SETS.get(name, name), _rows(entry)) for name, entry in provenance.data.items()]
    if isinstance(provenance, PerTAProvenance):
        return section("edit", heading, facts([*stack, *sets, *_perta(provenance)]))
    summary = [("summary", str(provenance)), ("rank", number(provenance.rank))]
    return section("edit", heading, facts([*stack, *summary, *sets]))


def _stack(header: ReportHeader) -> list[tuple[str, Cell]]:
    names = (element("li", element("code", name)) for name in header.adapters)
    adapters = element("ol", *names, class_="stack") if header.adapters else element("em", "none")
    return [("base model", element("code", header.base_model)), ("adapters, in stacking order", adapters)]


def _fused(stack: list[tuple[str, Cell]], provenance: FusedProvenance) -> Iterator[Markup]:
    yield facts([
        *stack, ("rank", str(provenance.rank)), ("energy of the sum kept", share(provenance.energy_kept))
    ])  # fmt: skip
    parts = [
        [element("code", str(part["name"])), number(part["strength"]), _hash(part["sha256"])]
        for part in provenance.parts
    ]
    yield table("The adapters that it is the sum of", ["adapter", "strength", "SHA-256"], parts)
    yield element("p", "How each part was made is in its own provenance: ", element("code", "peft-perta inspect PART"))


def _perta(provenance: PerTAProvenance) -> Iterator[tuple[str, Cell]]:
    config, base = provenance.config, provenance.base_model
    if base.get("revision"):
        yield "revision of the base model", element("code", base["revision"])
    yield "quantization", (base.get("quantization") or {}).get("quant_method", "none")
    forget_adapter = provenance.forget_adapter
    yield "forget adapter", join(element("code", str(forget_adapter["name"])), ", SHA-256 ",
                                 _hash(forget_adapter["sha256"]))  # fmt: skip
    point = _GRADIENT_POINTS.get(config["gradients_at"], config["gradients_at"])
    yield "method", f"{config['weighting']} weights per {config['granularity']}, gradients at the {point}"
    yield "strength", element("data", f"{config['strength']:.4g}", value=repr(config["strength"]))
    yield "size", f"rank {provenance.rank}, {len(provenance.layers)} layers edited, {config['dtype']}"
    yield "energy of the edit kept", join(share(provenance.energy_kept), " (of its squared norm, by the rank)")
    on_inputs = [layer.left_on_inputs for layer in provenance.layers if layer.left_on_inputs]
    if on_inputs:
        forget, retain = (sum(left[name] for left in on_inputs) / len(on_inputs) for name in ("forget", "retain"))
        yield "effect kept after weighting input directions", join(
            share(forget), " on inputs of the forget rows, ", share(retain),
            " on inputs of the retain rows (squared output, mean over layers)",
        )  # fmt: skip
    yield "damage by the limited rank", _fit_kl(provenance.fit_kl)


def _fit_kl(fit_kl: float | None) -> Cell:
    if fit_kl is None:
        return "not measured"
    if fit_kl == 0:
        return "none: the rank holds the edit exactly"
    return join(number(fit_kl), " nats per token (KL divergence from the edit at full rank)")


def _rows(entry: dict[str, Any]) -> Markup:
    return join(f"{entry['samples']} rows, SHA-256 of their tokens ", _hash(entry["sha256"]))


def _hash(digest: str) -> Markup:
    return element("code", digest[:16], title=digest)
