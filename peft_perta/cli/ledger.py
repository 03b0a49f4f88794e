r"""Keep the record of the requests to forget that adapters of one base meet, and make one adapter of the open ones. It
needs a directory with the adapters below it; each action tells what else it takes: peft-perta ledger ACTION --help.

Example:
  peft-perta ledger add adapters request-1 --adapter adapters/first --forget first.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters import (
    LEDGER_NAME,
    PROVENANCE_NAME,
    Ledger,
    Request,
    ServedAdapter,
    add_request,
    check_ledger,
    format_checks,
    open_adapters,
    open_rows,
    read_ledger,
    rebuild_adapter,
    record_audit,
    record_rebuilt,
    withdraw_request,
)
from ..data import visible
from ..errors import OutputError
from ._goal import add_goal_without_forget, load_search, search_adapters
from ._options import BASE_MODEL, ROWS, add_forget, add_model, add_output, add_revision, print_next, save_adapter
from ._output import check_output_of
from ._terminal import checked, grid, marked, show

_OPEN_ROWS = f"the forget rows: {ROWS}; give one option for each file, all rows of the open requests and no others"


_Line = tuple[str, str, str]  # a request or nothing, a date, and what is told


class _Action(NamedTuple):
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The actions, each with its options."""
    actions = parser.add_subparsers(
        title="actions", required=True, metavar="ACTION", dest="action", help="what to do with the ledger"
    )
    for name, action in _ACTIONS.items():
        of_action = actions.add_parser(name, help=action.summary, description=f"{action.summary.capitalize()}.")
        of_action.add_argument("ledger", metavar="DIR", help=f"the directory that holds {LEDGER_NAME} and the adapters")
        action.add_options(of_action)


def run(options: argparse.Namespace) -> int:
    """Run the action; the status is 1 if ``check`` finds a fault."""
    return _ACTIONS[options.action].run(options)


def _add_add(parser: argparse.ArgumentParser) -> None:
    _add_request(parser)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="the adapter that meets the request, below the directory"
    )
    add_forget(parser, note="; the ledger keeps their hashes")
    _add_date(parser)


def _add(options: argparse.Namespace) -> int:
    ledger = add_request(
        options.ledger, options.request, adapter=options.adapter, forget=options.forget, date=options.date
    )
    _show(ledger)
    return 0


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "audit", metavar="JSON", help="the audit.json of an open request's adapter, or of the one that was rebuilt"
    )
    _add_date(parser)


def _audit(options: argparse.Namespace) -> int:
    _show(record_audit(options.ledger, options.audit, date=options.date))
    return 0


def _add_withdraw(parser: argparse.ArgumentParser) -> None:
    _add_request(parser)
    _add_date(parser)


def _withdraw(options: argparse.Namespace) -> int:
    _show(withdraw_request(options.ledger, options.request, date=options.date))
    return 0


def _add_list(parser: argparse.ArgumentParser) -> None:
    """It takes the directory alone."""


def _list(options: argparse.Namespace) -> int:
    _show(read_ledger(options.ledger))
    return 0


def _add_rebuild(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--forget", required=True, action="append", metavar="ROWS", help=_OPEN_ROWS)
    parser.add_argument(
        "--rank", type=int, help="truncate to this rank (default: the sum of the ranks, which is exact)"
    )
    add_output(parser, "the adapter")
    _add_date(parser)
    add_goal_without_forget(parser, required=True)


def _rebuild(options: argparse.Namespace) -> int:
    output = check_output_of(options, PROVENANCE_NAME)
    ledger = read_ledger(options.ledger)
    _check_beside(ledger, output)
    named = {name: str(place) for name, place in open_adapters(options.ledger).items()}
    forget = open_rows(options.ledger, options.forget)
    model, goal, samples = load_search(options, search_adapters(options, named), forget)
    emitted = rebuild_adapter(
        model,
        options.ledger,
        goal,
        samples["forget"],
        samples["retain"],
        ["task"] if options.task_adapter else [],
        options.rank,
    )
    save_adapter(emitted, options.output)
    if ledger.directory.resolve() in output.resolve().parents:
        _show(record_rebuilt(options.ledger, output, seen=ledger.last, date=options.date))
    else:
        print(f"It does not lie below {options.ledger}, so the ledger does not hold it")
    print_next(options, ", then serve it alone, or beside the task adapter")
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", default=[], action="append", metavar="ROWS", help=f"{_OPEN_ROWS} (default: none)")
    parser.add_argument("--model", metavar="NAME", help=f"{BASE_MODEL} (default: the one that the ledger names)")
    add_revision(parser)
    parser.add_argument(
        "--seen", metavar="HASH", help="the last hash as `list` once printed it: the history up to it must be there"
    )


def _check(options: argparse.Namespace) -> int:
    checks = check_ledger(
        options.ledger, forget=options.forget, base=options.model, revision=options.revision, seen=options.seen
    )
    options.status = int(any(check.failed for check in checks))
    text = format_checks(checks)
    show(visible(text), checked(checks), marked(text.splitlines()[-1]))
    return options.status


_ACTIONS = {
    "add": _Action("enter a request with its adapter and the hashes of its rows", _add_add, _add),
    "audit": _Action("enter the verdict of an audit", _add_audit, _audit),
    "withdraw": _Action("take a request back", _add_withdraw, _withdraw),
    "list": _Action("show every request, with its adapter and its verdicts", _add_list, _list),
    "rebuild": _Action(
        "make one adapter of all open requests, at the strength that meets a goal", _add_rebuild, _rebuild
    ),
    "check": _Action("check the history, and the adapters of the open requests on the disk", _add_check, _check),
}


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", metavar="NAME", help="the name of the request, which the adapter's card will show")


def _add_date(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="the day of the entry (default: today)")


def _check_beside(ledger: Ledger, output: Path) -> None:
    """
    Raises:
        OutputError: the output is the adapter of a request, or lies in it.
    """
    own = output.resolve()
    for request in ledger.requests.values():
        place = ledger.place(request.added).resolve()
        if place == own or place in own.parents:
            raise OutputError(f"{output} is the adapter of the request {request.name!r}; choose another output")


def _show(ledger: Ledger) -> None:
    """Print a line for each request and each verdict, and the hash that stands for them."""
    width = max((len(name) for name in ledger.requests), default=0)
    lines = [line for request in ledger.requests.values() for line in _lines(request)]
    if ledger.served is not None:
        lines += _served_lines(ledger.served)
    texts = [f"{name:<{width}}  {date}  {facts}" for name, date, facts in lines]
    show(visible("\n".join([*texts, str(ledger)])), grid(lines), marked(str(ledger)))


def _lines(request: Request) -> list[_Line]:
    added = request.added
    state = f"withdrawn {request.withdrawn}" if request.withdrawn else "open"
    facts = f"{added.adapter['path']} ({added.adapter['factors_sha256'][:16]}), {len(added.forget)} rows"
    return [(request.name, added.date, f"{state}: {facts}"), *_verdicts(request)]


def _served_lines(served: ServedAdapter) -> list[_Line]:
    rebuilt = served.rebuilt
    state = "stale, requests came or were taken back since" if served.stale else "of all open requests"
    facts = f"{rebuilt.adapter['path']} ({rebuilt.adapter['factors_sha256'][:16]})"
    return [("", rebuilt.date, f"{state}: {facts}"), *_verdicts(served)]


def _verdicts(of: Request | ServedAdapter) -> list[_Line]:
    return [("", entry.date, _verdict(entry.audit)) for entry in of.audits]


def _verdict(audit: Mapping[str, Any]) -> str:
    because = " ".join(audit["because"].split())
    return f"{because}, on {audit['rows']} rows, against the {audit['yardstick']} model"
