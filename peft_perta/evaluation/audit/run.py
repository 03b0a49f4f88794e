"""Run an audit: every attack in turn, each kept as soon as it is done, until all are done or the time is over."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data import check_disjoint
from ...errors import ConfigError
from ..attacks import CANNOT_BE_APPLIED, check_attacks, run_attacks, skipped_result
from ..attacks.as_asked import AS_ASKED
from ..attacks.attack import Answer, AttackResult, AttackSettings, Victims, attacked_rows
from ..completions import losses_of
from ..metrics.bootstrap import Interval
from ..subject import Subject
from .evidence import Evidence, evidence_of, ratio
from .never_seen import NeverSeen, compare_never_seen
from .record import AuditRecord, identity_of, measured_beside
from .verdict import RULE, Verdict, decide

# What finds most of what is left in the least time comes first.
_ORDER = (
    "depth", "logit-lens", "relearning", "prefix", "hops", "paraphrase", "rewording", "aliases", "conversation",
    "requantization", "sampling", "full-rank", "switched-off",
)  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        yardstick: what stands for 'never learned': 'retain-only', or 'origin', the base with every adapter off.
        rows: the number of forget rows that were attacked.
        results: of the attacks, in the order in which they were made; 'as-asked' first.
        kept: role -> mean probability of the retain rows, as a share of the full model's.
        never_seen: what rows that no model saw tell; None where none were given.
        not_tried: attacks for which there was no time.
    """

    yardstick: str
    rows: int
    results: list[AttackResult]
    kept: dict[str, Interval]
    not_tried: list[str]
    never_seen: NeverSeen | None = None

    @cached_property
    def evidence(self) -> list[Evidence]:
        """Every measure of every attack."""
        return [*evidence_of(self.results), *(self.never_seen.evidence if self.never_seen else ())]

    @property
    def strongest(self) -> list[Evidence]:
        """The measures of plain answers, and of each attack the one that finds the largest share."""
        best: dict[str, Evidence] = {}
        for piece in self.evidence:
            key = piece.name if piece.attack == AS_ASKED.name else piece.attack
            if piece.share is not None and (key not in best or piece.share.mean > _share_of(best[key])):
                best[key] = piece
        return list(best.values())

    @cached_property
    def verdict(self) -> Verdict:
        """What the evidence amounts to, by ``RULE``."""
        return decide(self.evidence)

    def worst_leaks(self, count: int = 10) -> list[tuple[AttackResult, Answer, float]]:
        """The answers that say most of what is true, the worst first: (result, answer, its ROUGE-L recall); one for
        each question and for each truth. Switching the adapter off does not count."""
        leaks = [
            (result, answer, recall)
            for result in self.results
            if result.attack != "switched-off" and result.answers
            for answer, recall in zip(result.answers, result.rows["unlearned"]["rouge_l_recall"], strict=True)
        ]
        seen: set[str] = set()
        worst = []
        for leak in sorted(leaks, key=lambda leak: -leak[2]):
            texts = {leak[1].asked.strip(), leak[1].truth.strip()}
            if not texts & seen:
                worst.append(leak)
            seen |= texts
        return worst[:count]

    def to_dict(self) -> dict[str, Any]:
        """The verdict and the evidence, as JSON takes them."""
        return {
            "verdict": self.verdict.name,
            "because": str(self.verdict),
            "rule": RULE,
            "yardstick": self.yardstick,
            "rows": self.rows,
            "kept": {role: interval._asdict() for role, interval in self.kept.items()},
            "evidence": [dataclasses.asdict(piece) for piece in self.evidence],
            "never_seen": dataclasses.asdict(self.never_seen) if self.never_seen else None,
            "skipped": {result.attack: result.skipped for result in self.results if result.skipped},
            "not_tried": self.not_tried,
        }


def audit(
    victims: Victims,
    *,
    yardstick: str = "retain-only",
    settings: AttackSettings | None = None,
    minutes: float | None = None,
    output_dir: str | Path | None = None,
    beside: str | Path | None = None,
) -> Audit:
    """Attack an unlearned model in every way, and say whether the rows are forgotten as if they had never been learned.

    Args:
        victims: the unlearned and the full model, and as ``retain_only`` the yardstick; the forget rows; and rows that
            the model must keep, which no method should have seen.
        yardstick: what ``victims.retain_only`` is: 'retain-only', or 'origin'.
        settings: how hard each attack tries; ``AttackSettings()`` by default.
        minutes: no attack begins after that time; None for no limit. Plain answers are always measured.
        output_dir: a directory where each attack is kept once it is made, in ``AUDIT_RECORD_NAME``: the same audit goes
            on from there.
        beside: such a directory of an audit of another unlearned model: what that measured of the full model and of the
            yardstick is taken from there, so that one model is attacked instead of three.

    Raises:
        ConfigError: a model is missing, ``minutes`` is no number above 0, or ``beside`` is of other models, rows or
            settings.
        DataError: a set is empty or malformed, a row is in both sets, or the forget rows cannot tell the full model
            from the yardstick. The models are as they were, whatever is raised.
    """
    settings = settings or AttackSettings()
    if victims.full is None or victims.retain_only is None:
        raise ConfigError("an audit needs the full model and a yardstick (a retain-only model, or the origin)")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"minutes: expected None or a number above 0, found {minutes!r}")
    encode = victims.unlearned.encode
    forget = encode(victims.rows, "the forget rows")
    check_disjoint(forget, encode(victims.retain, "the retain rows"))
    if victims.never_seen:
        check_disjoint(forget, encode(victims.never_seen, "the never-seen rows"), "the never-seen set")
    skipped = check_attacks(victims, None, settings)
    identity = identity_of(victims, settings)
    record = AuditRecord(output_dir, identity) if output_dir is not None else None
    if beside is not None:
        victims = dataclasses.replace(victims, measured=measured_beside(beside, identity))
    began = time.perf_counter()
    results, not_tried = [], []
    for name in (AS_ASKED.name, *_ORDER):
        found = skipped.get(name) or (record.found.get(name) if record else None)
        if found is None and name != AS_ASKED.name and minutes and time.perf_counter() - began > 60 * minutes:
            not_tried.append(name)
            continue
        if found is None:
            found = AS_ASKED.run(victims, settings) if name == AS_ASKED.name else _tried(name, victims, settings)
            if record:
                record.add(name, found)
        results += found
        if name == AS_ASKED.name:
            decide(evidence_of(results))  # nothing to audit is told before the attacks
    never_seen = compare_never_seen(victims, settings) if victims.never_seen else None
    return Audit(yardstick, len(attacked_rows(victims, settings)), results, _kept(victims), not_tried, never_seen)


def _share_of(piece: Evidence) -> float:
    assert piece.share is not None
    return piece.share.mean


def _tried(name: str, victims: Victims, settings: AttackSettings) -> list[AttackResult]:
    """The results of an attack, or the one that says why it turned out that it cannot be made."""
    try:
        return run_attacks(victims, [name], settings)
    except CANNOT_BE_APPLIED as error:
        return [skipped_result(name, error)]


def _kept(victims: Victims) -> dict[str, Interval]:
    """Role -> mean probability of the retain rows as a share of the full model's."""
    probabilities = {role: _probabilities(subject, victims.retain) for role, subject in victims.subjects()}
    return {role: ratio(values, of=probabilities["full"]) for role, values in probabilities.items() if role != "full"}


def _probabilities(subject: Subject, rows: Sequence[Mapping]) -> Tensor:
    samples = subject.encode(rows, "the retain rows")
    losses = losses_of(subject.model, samples, adapters=subject.adapters, batch_size=subject.batch_size)
    return losses.to(torch.float64).neg().exp()
