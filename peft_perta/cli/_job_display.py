"""A job at a terminal: its steps with their times, redrawn while they run, and below them what is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ..job import Begun, Plan, clock
from ._terminal import console

_BAR = 30  # characters


class JobDisplay:
    """What a job says, as one display that stays in its place.

    What else is written while it is shown: a bar, and what a trainer prints to standard output, become its last lines;
    the lines of standard error go above it.
    """

    def __init__(self) -> None:
        self._console = console()
        self._live = Live(self, console=self._console, redirect_stdout=False, redirect_stderr=False)
        self._open = contextlib.ExitStack()
        self._plan: Plan | None = None
        self._begun: Begun | None = None
        self._since = 0.0
        self._spinner = Spinner("dots", style="cyan")
        self._bars, self._log = _Bars(sys.stderr, self._console.print), _Bars(sys.stdout, self._logged)
        self._last_log = Text()

    def __enter__(self) -> JobDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def say(self, what: Plan | Begun | str) -> None:
        """Show a plan, a step that begins, or a line."""
        if isinstance(what, Plan):
            self._plan = what
            self._console.print(*plan_lines(what), "", sep="\n")
            self._open.enter_context(contextlib.redirect_stdout(self._log))
            if sys.stderr is not None and sys.stderr.isatty():
                self._open.enter_context(contextlib.redirect_stderr(self._bars))
            self._open.enter_context(self._live)
            self._console.show_cursor()  # a job that is killed would leave a terminal without one
        elif isinstance(what, Begun):
            self._begun, self._since, self._bars.last, self._last_log = what, time.perf_counter(), "", Text()
        else:
            self._begun = None
            self._open.close()
            self._console.print(Text(what))

    def _logged(self, line: Text) -> None:
        self._last_log = line

    def __rich__(self) -> RenderableType:
        assert self._plan is not None
        steps = plan_table(self._plan, self._begun, self._spinner, time.perf_counter() - self._since)
        if self._begun is None:
            return steps
        return Group(steps, self._footer(self._begun), *map(_in_one_line, (self._bars.last, self._last_log.plain)))

    def _footer(self, begun: Begun) -> Table:
        left = begun.plan.left(begun.step.name, time.perf_counter() - self._since)
        drawn = Table.grid(padding=(0, 2))
        bar = ProgressBar(begun.of, begun.number - 1, width=_BAR, complete_style="cyan")
        drawn.add_row(Text(f"step {begun.number} of {begun.of}", "bold"), bar, Text(left))
        return drawn


def plan_lines(plan: Plan) -> list[Text]:
    """What is known of a job, with the name of each fact in bold."""
    lines = [Text(line) for line in plan.lines]
    for line in lines:
        line.highlight_regex("^[a-z ]+:", "bold")
    return lines


def plan_table(plan: Plan, begun: Begun | None = None, spinner: RenderableType = " ", elapsed: float = 0.0) -> Table:
    """The steps: what each does, its time (measured, running or predicted), and what it writes."""
    drawn = Table.grid(padding=(0, 2))
    for column in range(4):
        drawn.add_column(justify="right" if column == 2 else "left", no_wrap=column == 2)
    for step in plan.steps:
        expected = f"about {plan.expected(step.name)}".replace("about unknown", "unknown")
        if step.name in plan.took:
            cells: tuple[Any, ...] = (Text("✓", "green"), step.what, clock(plan.took[step.name]))
        elif begun is not None and step.name == begun.step.name:
            cells = (spinner, Text(step.what, "bold"), Text(clock(elapsed), "bold"))
        else:
            cells = (" ", Text(step.what, "dim"), Text(expected, "dim"))
        drawn.add_row(*cells, Text(step.name, "dim"))
    return drawn


def _in_one_line(text: str) -> Text:
    return Text(text, "dim", no_wrap=True, overflow="ellipsis")


class _Bars:
    """A standard stream beside a display: the bar that was drawn last is kept, whole lines are handed over.

    A bar is what follows a carriage return in the same write, as tqdm writes it; a message comes in writes of its own.

    Args:
        terminal: the stream, for all else that is asked of it.
        take: takes a line.
    """

    def __init__(self, terminal: TextIO, take: Callable[[Text], None]) -> None:
        self._terminal, self._take = terminal, take
        self._message = ""
        self.last = ""

    def write(self, text: str) -> int:
        """Take a text, as a stream does."""
        _, carriage, bar = text.rpartition("\r")
        if carriage:
            self.last, self._message = Text.from_ansi(bar).plain.strip(), ""
            return len(text)
        *whole, self._message = f"{self._message}{text}".split("\n")
        for line in whole:
            if (message := Text.from_ansi(line)).plain.strip():
                self._take(message)
            else:
                self.last = ""  # a bar was closed
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)
