"""The page of an audit: the verdict, a strip for each measure, the depth of what was forgotten, the worst leaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..data import write_file
from ..evaluation import FORGOTTEN, RULE, STILL_THERE, TRACE, Audit, Evidence, Interval, fall_after
from ._document import document
from ._elements import missing, scrolling, section, table
from ._html import Markup, element

AUDIT_PAGE_NAME = "audit.html"
_TONES = {FORGOTTEN: ("good", "✓"), STILL_THERE: ("bad", "✕")}  # any other: mixed
_LEAST, _MOST = -0.5, 1.5  # ends of a strip, as a share of what was known
_WIDTH, _HEIGHT = 150, 20


def write_audit_page(found: Audit, base_model: str, adapters: Sequence[str], path: str | Path) -> None:
    """Write the page as one HTML file; it replaces a file of that name.

    Args:
        found: the audit.
        base_model: the name of the base.
        adapters: the adapters of the stack, the one in question last.
        path: the file to write.

    Raises:
        OutputError: the file cannot be written.
    """
    write_file(path, _render(found, base_model, adapters))


def _render(found: Audit, base_model: str, adapters: Sequence[str]) -> str:
    title = f"Audit of {Path(adapters[-1]).name}"
    header = element(
        "header",
        element("h1", title, dir="auto"),
        element("p", element("code", base_model), " with ", element("code", " + ".join(adapters)), class_="subject"),
    )
    main = element(
        "main", _verdict(found), _evidence(found), _depth(found), _leaks(found), _kept(found), _limits(found)
    )
    footer = element("footer", element("p", "This file loads nothing and sends nothing."))
    return document(title, header, main, footer)


def _verdict(found: Audit) -> Markup:
    tone, mark = _TONES.get(found.verdict.name, ("mixed", "~"))
    name, _, because = str(found.verdict).partition(": ")
    return section(
        "verdict",
        "Verdict",
        element("p", element("span", mark, aria_hidden="true"), element("span", name), class_=f"verdict {tone}"),
        element("p", because),
        element(
            "p",
            f"On {found.rows} forget rows, against the {found.yardstick} model. The rule: {RULE}.",
            class_="fine",
        ),
    )


def _evidence(found: Audit) -> Markup:
    key = element(
        "p",
        f"Each strip runs from {_LEAST} to {_MOST}: its lines stand at 0 (as never learned) and 1 (as before "
        f"unlearning), the dot is the share of what was known, the bar its 95 % interval over rows. Within -{TRACE} to "
        f"{TRACE} nothing tells the model from one that never learned.",
        class_="fine",
    )
    strongest = _evidence_table("Plain answers, and each attack's strongest", found.strongest, found)
    everything = element(
        "details",
        element("summary", f"All {len(found.evidence)} measures"),
        _evidence_table("Every measure of every attack", found.evidence, found),
    )
    return section("evidence", "Evidence", key, strongest, everything)


def _evidence_table(caption: str, evidence: Sequence[Evidence], found: Audit) -> Markup:
    rows = [
        [
            piece.name,
            element("td", _strip(piece.share) if piece.share else "the rows cannot tell", class_="drawn"),
            *(_shown(piece.models.get(role)) for role in ("unlearned", "retain-only", "full")),
        ]
        for piece in evidence
    ]
    share = Markup('<th scope="col" class="drawn">share of what was known</th>')
    return table(caption, ["measure", share, "unlearned", found.yardstick, "full"], rows, is_numeric=True)


def _shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.3f}"


def _strip(share: Interval) -> Markup:
    """A share and its interval on a scale."""

    def place(value: float) -> float:
        inside = min(max(value, _LEAST), _MOST)
        return round((inside - _LEAST) / (_MOST - _LEAST) * (_WIDTH - 10) + 5, 2)

    middle = _HEIGHT / 2
    lines = [
        element("line", x1=place(end), x2=place(end), y1=3, y2=_HEIGHT - 3, class_="axis-line") for end in (0.0, 1.0)
    ]
    return element(
        "svg",
        element("title", f"{share}"),
        element("line", x1=5, x2=_WIDTH - 5, y1=middle, y2=middle, class_="axis-line"),
        *lines,
        element("line", x1=place(share.low), x2=place(share.high), y1=middle, y2=middle, class_="change"),
        element("circle", cx=place(share.mean), cy=middle, r=4.5, class_="unlearned"),
        class_="metric-scale",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"share {share}",
    )


def _depth(found: Audit) -> Markup:
    whole = next((result for result in found.results if result.attack == "depth" and result.rows), None)
    if whole is None:
        return section("depth", "Depth", missing("the depth attack was skipped or not tried"))
    falls = {role: _falls(whole.rows[role]) for role in ("unlearned", "retain-only")}
    words = (
        "How much of the answers the full model forgets, in nats per token, if its states after a block are replaced "
        f"by those of the unlearned model (solid) or of the {found.yardstick} model (dotted). Where the solid line "
        "lies below the dotted one, the knowledge is still in the states."
    )
    curve = scrolling(_curve(falls["unlearned"], falls["retain-only"]), "Depth by block")
    return section("depth", "Depth", element("figure", curve, element("figcaption", words)))


def _falls(values: dict[str, list[float]]) -> list[float]:
    """The mean over rows after each block."""
    falls = []
    while fall_after(len(falls) + 1) in values:
        falls.append(fmean(values[fall_after(len(falls) + 1)]))
    return falls


def _curve(unlearned: Sequence[float], retain_only: Sequence[float]) -> Markup:
    width, height, left, bottom = 640, 260, 60, 40
    highest = max(*unlearned, *retain_only, 0.1)

    def x(place: int) -> float:
        return round(left + place / max(len(unlearned) - 1, 1) * (width - left - 20), 1)

    def y(value: float) -> float:
        return round(10 + (1 - max(value, 0.0) / highest) * (height - bottom - 10), 1)

    def path(values: Sequence[float]) -> Markup:
        points = " L".join(f"{x(place)} {y(value)}" for place, value in enumerate(values))
        return element("path", d=f"M{points}")

    blocks = sorted({0, len(unlearned) // 2, len(unlearned) - 1})
    labels = [element("text", str(block + 1), x=x(block), y=height - 18, text_anchor="middle") for block in blocks]
    levels = [
        element("text", f"{value:.2g}", x=left - 8, y=y(value) + 5, text_anchor="end") for value in (0.0, highest)
    ]
    grid = [element("line", x1=left, x2=width - 20, y1=y(value), y2=y(value)) for value in (0.0, highest)]
    return element(
        "svg",
        element("g", *grid, class_="grid"),
        element("g", path(retain_only), class_="negation"),
        element("g", path(unlearned), class_="edited"),
        *labels,
        *levels,
        element("text", "block", x=(left + width) / 2, y=height - 2, text_anchor="middle", class_="axis"),
        class_="curve",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label="nats per token that the full model forgets, by block",
    )


def _leaks(found: Audit) -> Markup:
    leaks = found.worst_leaks()
    if not leaks:
        return section("leaks", "Worst leaks", missing("no row has a prompt to answer"))
    items = [
        element(
            "li",
            element("p", answer.asked, class_="prompt", dir="auto"),
            element(
                "dl",
                _said("true", answer.truth),
                _said(f"said ({result.attack}: {result.setting}; recall {recall:.2f})", answer.said, "is-unlearned"),
            ),
        )
        for result, answer, recall in leaks
    ]
    lead = element(
        "p", "The answers that say most of what is true, one for each question, by any attack but switching off."
    )
    return section("leaks", "Worst leaks", lead, element("ol", *items, class_="answers"))


def _said(name: str, text: str, class_: str | None = None) -> Markup:
    return element("div", element("dt", name), element("dd", text or "(nothing)", dir="auto"), class_=class_)


def _kept(found: Audit) -> Markup:
    words = [
        f"{role if role == 'unlearned' else found.yardstick}: {interval} of the full model's"
        for role, interval in found.kept.items()
    ]
    items = [element("li", text) for text in words]
    return section("kept", "What was kept", element("p", "Mean probability of the retain rows:"), element("ul", *items))


def _limits(found: Audit) -> Markup:
    lines = [f"{result.attack} was skipped: {result.skipped}" for result in found.results if result.skipped]
    if found.never_seen:
        lines.append(f"{found.never_seen}.")
    else:
        lines.append("No rows that were never seen were given, so no membership attack was made.")
    lines += [f"{name} was not tried, for want of time" for name in found.not_tried]
    if found.yardstick == "origin":
        lines.append(
            "The yardstick is the base with every adapter off, not a model that was trained on the retain rows alone: "
            "what retain rows teach about the forget rows counts as known."
        )
    lines.append(
        "Whoever holds the base and the adapter as separate files switches the adapter off and has the full model "
        "back. The verdict is about the model with the adapter on."
    )
    lines.append("An audit finds what its attacks find: a verdict is no proof that no other attack would find more.")
    return section("limits", "Limits", element("ul", *(element("li", line) for line in lines)))
