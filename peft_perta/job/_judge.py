"""Judge the result of a job: losses, answers, attacks, and the checks of its files."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..adapters import load_emitted, verify_adapter
from ..data import spread, write_file
from ..errors import DataError
from ..evaluation import AttackSettings, Audit, Victims, audit
from ..html_report import (
    AUDIT_PAGE_NAME,
    report_data_of_rows,
    write_audit_page,
    write_html_report,
)
from ._steps import Step, calibration_of
from ._workshop import ADAPTER, RETAIN_ONLY, Workshop

JUDGED, VERIFIED, REPORT_NAME = "judged.json", "verified.json", "report.html"
_AUDIT = "audit"  # directory: the record of the attacks
_UNLEARN = "unlearn"


def judge_steps() -> list[Step]:
    """The steps that judge the adapter, in their order."""
    return [
        Step(JUDGED, "judge and attack the result", judge, ("judging",), (ADAPTER,)),
        Step(VERIFIED, "check the adapter's files, and load it in a fresh process", verify, (), (ADAPTER,)),
    ]


def judge(workshop: Workshop) -> None:
    """Write ``judged.json``, the report, and the page of the audit."""
    directory, full = workshop.directory, workshop.full
    with workshop.attached({_UNLEARN: directory / ADAPTER}):
        after = workshop.losses([*full, _UNLEARN])
        stacks = {"full": full, "unlearned": [*full, _UNLEARN]}
        if workshop.retain_only:
            stacks[RETAIN_ONLY] = [workshop.retain_only]
        report = report_data_of_rows(
            workshop.model,
            workshop.tokenizer,
            {"forget": workshop.rows.forget, "retain": workshop.rows.unseen},
            stacks,
            workshop.header(),
            max_new_tokens=workshop.recipe.judging.max_new_tokens,
        )
        found, reason = _audited(workshop)
    if found is not None:
        report = dataclasses.replace(report, attacks=found.results, verdict=str(found.verdict))
        write_audit_page(found, workshop.model_name, workshop.header().adapters, directory / AUDIT_PAGE_NAME)
    write_html_report(report, directory / REPORT_NAME)
    emitted = load_emitted(directory / ADAPTER)
    calibration = calibration_of(emitted)
    judged: dict[str, Any] = {
        "after": after,
        "models": report.models,
        "calibration": calibration.to_dict() if calibration is not None else None,
        "rank": emitted.lora_config.r,
        "audit": found.to_dict() if found is not None else None,
        "not audited": reason,
    }
    write_file(directory / JUDGED, json.dumps(judged, indent=1) + "\n")


def _audited(workshop: Workshop) -> tuple[Audit | None, str]:
    """What the attacks found; or None, and why none was made."""
    judging, yardstick, rows = workshop.recipe.judging, workshop.yardstick, workshop.rows.forget
    if yardstick is None:
        return None, "no model shows what 'never learned' would be: give --retain-only-adapter or a task adapter"
    if not judging.attacked_rows:
        return None, "the recipe has attacked_rows: 0"
    count = min(len(rows), judging.attacked_rows)
    settings = AttackSettings(
        relearning_rows=tuple(sorted({1, min(10, max(count // 2, 1))})),
        rows=judging.attacked_rows,
        generated=count,
        max_new_tokens=judging.max_new_tokens,
    )
    unlearned, full = workshop.subject([*workshop.full, _UNLEARN]), workshop.subject(workshop.full)
    kept = spread(workshop.rows.unseen, judging.rows)
    victims = Victims(unlearned, full, workshop.subject(yardstick), rows, kept)
    try:
        found = audit(
            victims,
            yardstick=RETAIN_ONLY if workshop.retain_only else "origin",
            settings=settings,
            minutes=judging.minutes,
            output_dir=workshop.directory / _AUDIT,
        )
    except DataError as error:  # too few rows, or such as tell the models apart too little
        return None, str(error)
    return found, ""


def verify(workshop: Workshop) -> None:
    """Write ``verified.json``: the checks of the adapter's files, and on the base where it has a name."""
    base, revision = workshop.recipe.model, workshop.recipe.revision
    checks = verify_adapter(workshop.directory / ADAPTER, base, revision=revision)
    write_file(
        workshop.directory / VERIFIED, json.dumps([dataclasses.asdict(check) for check in checks], indent=1) + "\n"
    )
