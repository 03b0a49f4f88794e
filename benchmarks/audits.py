"""Audits side by side: the full model, the retain-only model, and adapters of a testbed's model.

The full and the retain-only model are the two ends of every scale; the verdict on them must be 'still there' and
'forgotten as if never learned'. The first audit measures both, the others take that from it. What an interrupted run
has made is kept in the output.

    python -m benchmarks.audits negation=DIR perta=DIR [--testbed smollm2] [--attacked 10] [--minutes 10] --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from peft_perta import attach_adapters, load_base
from peft_perta.comparison import PROSE, TESTBEDS, read_testbed
from peft_perta.data import read_rows, write_file
from peft_perta.evaluation import AttackSettings, Audit, Interval, Subject, Victims, audit
from peft_perta.html_report import write_audit_page
from peft_perta.model import quiet

TASK, RETAIN_ONLY = "task", "retain-only"
ENDS = ("full", RETAIN_ONLY)


def end_of_scale(found: Audit, role: str) -> Audit:
    """The audit of the full or the retain-only model, which an audit of any adapter has measured too."""
    results = [
        dataclasses.replace(result, rows={**result.rows, "unlearned": result.rows[role]})
        for result in found.results
        if not result.skipped
    ]
    kept = Interval(1.0, 1.0, 1.0) if role == "full" else found.kept[role]
    return dataclasses.replace(found, results=results, kept={**found.kept, "unlearned": kept}, never_seen=None)


def table(audits: dict[str, Audit]) -> str:
    """A column for each model, a line for each measure that is plain or the strongest of an attack on one of them: the
    share of what was known."""
    lines = [f"| | {' | '.join(audits)} |", "|" + "---|" * (len(audits) + 1)]
    shares = {label: {piece.name: piece.share for piece in found.evidence} for label, found in audits.items()}
    of_adapters = [found for label, found in audits.items() if label not in ENDS] or audits.values()
    strongest = {piece.name for found in of_adapters for piece in found.strongest}
    for name in (name for name in next(iter(shares.values())) if name in strongest):
        cells = [str(of.get(name) or "-") for of in shares.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kept = [str(found.kept["unlearned"]) for found in audits.values()]
    lines.append(f"| kept of unseen retain rows | {' | '.join(kept)} |")
    lines.append(f"| **verdict** | {' | '.join(found.verdict.name for found in audits.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Run the audits that are asked for, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "adapters", nargs="*", metavar="NAME=DIR", help="negative adapters, for the task adapter's model"
    )
    parser.add_argument("--testbed", choices=sorted(TESTBEDS), default="small", help="whose model (default: small)")
    parser.add_argument("--rows", type=int, default=40, help="forget rows, from the first (default: 40)")
    parser.add_argument("--judged-rows", type=int, default=60, help="retain rows, from the last (default: 60)")
    parser.add_argument("--attacked", type=int, metavar="COUNT", help="of these, at even distances (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--minutes", type=float, help="of each audit (default: no limit)")
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    quiet()
    given = dict(text.split("=", 1) for text in options.adapters)
    testbed = read_testbed(options.testbed)
    if testbed.task_adapter is None or testbed.retain_only_adapter is None:
        parser.error(f"--testbed {options.testbed}: expected one with a task adapter and a retain-only adapter")
    own = {TASK: testbed.task_adapter, RETAIN_ONLY: testbed.retain_only_adapter}
    forget, retain = (
        testbed.rows["forget"][: options.rows],
        testbed.rows["retain"][-options.judged_rows :],
    )
    model, tokenizer = load_base(testbed.base)
    model = attach_adapters(model, {**own, **given})
    settings = AttackSettings(
        relearning_rows=tuple(sorted({1, min(10, (options.attacked or len(forget)) // 2)})),
        rows=options.attacked,
        max_new_tokens=options.max_new_tokens,
    )
    audits: dict[str, Audit] = {}
    for label, stack in ({name: [TASK, name] for name in given} or {"full": [TASK]}).items():
        unlearned, full, retain_only = (Subject(model, tokenizer, names) for names in (stack, [TASK], [RETAIN_ONLY]))
        where, first = options.output / label, next(iter(audits), None)
        audits[label] = audit(
            Victims(unlearned, full, retain_only, forget, retain, read_rows(PROSE)),
            settings=settings,
            minutes=options.minutes,
            output_dir=where,
            beside=None if first is None else options.output / first,
        )
        write_audit_page(audits[label], testbed.base, stack, where / "audit.html")
    any_audit = next(iter(audits.values()))
    audits = {**{role: end_of_scale(any_audit, role) for role in ENDS}, **audits}
    for label, found in audits.items():
        print(f"{label}: {found.verdict}", flush=True)
    write_file(options.output / "table.md", table(audits) + "\n")
    print(table(audits))


if __name__ == "__main__":
    main()
