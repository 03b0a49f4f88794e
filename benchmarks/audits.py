"""Audits side by side: the full model, the retain-only model, and adapters of the shipped model.

The full and the retain-only model are the two ends of every scale; the verdict on them must be 'still there' and
'forgotten as if never learned'. What an interrupted run has made is kept in the output.

    python -m benchmarks.audits negation=DIR perta=DIR [--rows 40] [--minutes 10] --output DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_perta import attach_adapters, load_base
from peft_perta.comparison import ASSETS, PROSE
from peft_perta.data import read_rows, write_file
from peft_perta.evaluation import AttackSettings, Audit, Subject, Victims, audit
from peft_perta.html_report import write_audit_page
from peft_perta.model import quiet

TASK, RETAIN_ONLY = "task", "retain-only"


def table(audits: dict[str, Audit]) -> str:
    """A line for each measure, a column for each model: the share of what was known."""
    lines = [f"| | {' | '.join(audits)} |", "|" + "---|" * (len(audits) + 1)]
    shares = {label: {piece.name: piece.share for piece in found.evidence} for label, found in audits.items()}
    for name in next(iter(shares.values())):
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
    parser.add_argument("--rows", type=int, default=40, help="forget rows, from the first (default: 40)")
    parser.add_argument("--judged-rows", type=int, default=60, help="retain rows, from the last (default: 60)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--minutes", type=float, help="of each audit (default: no limit)")
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    quiet()
    given = dict(text.split("=", 1) for text in options.adapters)
    forget = read_rows(ASSETS / "forget.jsonl")[: options.rows]
    retain = read_rows(ASSETS / "retain.jsonl")[-options.judged_rows :]
    unrelated = read_rows(PROSE)
    model, tokenizer = load_base(str(ASSETS / "base"))
    own = {TASK: ASSETS / "task_adapter", RETAIN_ONLY: ASSETS / "retain_adapter"}
    model = attach_adapters(model, {**own, **given})
    stacks = {"full": [TASK], RETAIN_ONLY: [RETAIN_ONLY], **{name: [TASK, name] for name in given}}
    count = len(forget)
    settings = AttackSettings(
        relearning_rows=tuple(sorted({1, min(10, count // 2)})), max_new_tokens=options.max_new_tokens
    )
    audits = {}
    for label, stack in stacks.items():
        subjects = (Subject(model, tokenizer, names) for names in (stack, [TASK], [RETAIN_ONLY]))
        where = options.output / label
        audits[label] = audit(
            Victims(*subjects, forget, retain, unrelated),
            settings=settings,
            minutes=options.minutes,
            output_dir=where,
        )
        write_audit_page(audits[label], "the shipped model", stack, where / "audit.html")
        print(f"{label}: {audits[label].verdict}", flush=True)
    write_file(options.output / "table.md", table(audits) + "\n")
    print(table(audits))


if __name__ == "__main__":
    main()
