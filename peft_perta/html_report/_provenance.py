"""What was done, from what, how strongly, layer by layer, and by which commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..adapters import FusedProvenance, PerTAProvenance, Provenance
from ..evaluation import Calibration
from ._contents import ReportData
from ._curve import curve_tables, draw_curve
from ._heat import heat_maps
from ._markup import Markup, element, join
from ._parts import Cell, absent, facts, number, scrolling, section, share, table

_SETS = {"retain": "kept", "held-out retain": "held out to judge"}


def removed_section(report_data: ReportData, report: Provenance | None, how: str) -> Markup:
    heading = "What was removed, and from what"
    stack = [
        ("base model", element("code", report_data.base_model)),
        ("adapters on it, in order", _adapters(report_data)),
    ]
    if report is None:
        missing = absent("How the edit was made is not on record: no adapter with a provenance of ours was given.", how)
        return section("removed", heading, facts(stack), missing)
    if isinstance(report, FusedProvenance):
        rows = [
            [element("code", str(part["name"])), number(part["strength"]), _hash(part["sha256"])]
            for part in report.parts
        ]
        kept = facts([*stack, ("rank", str(report.rank)), ("energy of the sum kept", share(report.energy_kept))])
        note = absent("What went into each part is in the provenance of that part.", how)
        return section(
            "removed", heading, kept, table("One adapter, fused of", ["part", "strength", "SHA-256"], rows), note
        )
    sets = {name: _rows(entry) for name, entry in report.data.items()}
    if not isinstance(report, PerTAProvenance):
        done = [("what was done", str(report)), ("rank", number(report.rank)), *sets.items()]
        return section("removed", heading, facts([*stack, *done]))
    removed = [("removed", join("what these teach: ", sets.pop("forget")))] if "forget" in sets else []
    kept = [(_SETS.get(name, name), rows) for name, rows in sets.items()]
    return section("removed", heading, facts([*removed, *stack, *kept, *_edit(report)]))


def _rows(entry: dict[str, Any]) -> Markup:
    return join(f"{entry['samples']} rows, SHA-256 of their tokens ", _hash(entry["sha256"]))


def _adapters(report_data: ReportData) -> Markup:
    if not report_data.adapters:
        return element("em", "none")
    return element("ol", *(element("li", element("code", name)) for name in report_data.adapters), class_="stack")


def _edit(report: PerTAProvenance) -> Iterator[tuple[str, Cell]]:
    config, base = report.config, report.base_model
    if base.get("revision"):
        yield "revision", element("code", base["revision"])
    yield "quantisation", (base.get("quantization") or {}).get("quant_method", "none")
    yield "forget adapter", join(element("code", str(report.forget_adapter["name"])), ", SHA-256 ",
                                 _hash(report.forget_adapter["sha256"]))  # fmt: skip
    yield (
        "method",
        f"{config['weighting']} weights per {config['granularity']}, gradients at {config['gradients_at']}",
    )
    yield "strength", element("data", f"{config['strength']:.4g}", value=repr(config["strength"]))
    yield "size", f"rank {report.rank}, {len(report.layers)} layers edited, {config['dtype']}"
    yield "energy of the edit kept", share(report.energy_kept)
    left = [layer.left_on_inputs for layer in report.layers if layer.left_on_inputs]
    if left:
        forget, retain = (sum(found[name] for found in left) / len(left) for name in ("forget", "retain"))
        yield "where it acts", join(
            share(forget), " of its effect is kept on the forget set's inputs, ", share(retain),
            " on the retain set's (squared output, mean over layers)",
        )  # fmt: skip
    if report.fit_kl is None:
        yield "lost by its rank", "not measured"
    elif report.fit_kl == 0:
        yield "lost by its rank", "nothing: the rank holds the edit exactly"
    else:
        yield "lost by its rank", join(number(report.fit_kl), " nats per token (KL)")


def _hash(digest: str) -> Markup:
    return element("code", digest[:16], title=digest)


def strength_section(calibration: Calibration | None, how: str, how_beside: str) -> Markup:
    heading = "How strong"
    if calibration is None:
        missing = absent(
            "The strength was set by hand, or is not on record; nothing shows what another would have done.", how
        )
        return section("strength", heading, missing)
    goal, retain = calibration.goal, calibration.goal["retain_tolerance"]
    asked = (
        f"a loss of {goal['target_forget_loss']:.4g} on the forget rows"
        if retain is None
        else f"the most forgetting that raises the loss on retain rows by no more than {retain:.4g}"
    )
    intro = element(
        "p", f"Asked for: {asked}. More strength forgets more and costs more; the curve shows the exchange."
    )
    missed = (
        element("p", element("strong", "The goal was not reached"), " within 2 %.", class_="warning")
        if not calibration.reached
        else Markup()
    )
    beside = Markup()
    if not calibration.negation:
        beside = absent("Plain negation of the forget adapter, for comparison.", how_beside)
    if not calibration.retain_only:
        lacking = "The losses of a model that never saw the forget rows, as a point beside the curve."
        beside = join(beside, absent(lacking, how_beside))
    return section("strength", heading, intro, missed, draw_curve(calibration), curve_tables(calibration), beside)


def layers_section(report: Provenance | None, how: str) -> Markup:
    heading = "Layer by layer"
    if not isinstance(report, PerTAProvenance):
        missing = absent(
            "Weights and energy kept of each layer are in the provenance of an adapter that unlearn made.", how
        )
        return section("layers", heading, missing)
    intro = element(
        "p", "A weight says how much of a parameter's edit stays: near 1 it matters to the forget set, near 0 to the "
        "retain set. Rows are the model's blocks, from the input on; columns its modules; a cell is a mean over its "
        "layers.",
    )  # fmt: skip
    return section("layers", heading, intro, heat_maps(report))


def commands_section(report_data: ReportData) -> Markup:
    heading = "The exact commands"
    if not report_data.commands:
        return section("commands", heading, absent("No command was given: the numbers came by way of Python."))
    lines = element("pre", element("code", "\n".join(report_data.commands)))
    return section("commands", heading, scrolling(lines, "Commands"))
