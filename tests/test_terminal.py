"""What a person at a terminal sees: tables and one display over a job. What is piped is the plain text."""

import io
import re
import sys

import pytest
from tqdm.auto import tqdm

from peft_perta.adapters import Check
from peft_perta.cli import evaluate, main
from peft_perta.cli._job_display import JobDisplay
from peft_perta.cli._terminal import checked, marked, named, show, table
from peft_perta.comparison import METHODS
from peft_perta.evaluation import AttackResult
from peft_perta.job import Begun, Plan
from peft_perta.job._steps import Step

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d;)*[349]\d")
STEPS = [Step("trained", "train it", print, ()), Step("judged.json", "judge it", print, ())]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True

    @property
    def text(self):
        return CODES.sub("", self.getvalue())


@pytest.fixture
def opened(monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "90", "LINES": "20"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def opened():  # in the test itself: pytest puts streams of its own in place before each of its phases
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(sys, "stdout", Terminal())
        return sys.stdout

    return opened


def plan():
    return Plan(["job: M must forget F", "everything goes to out"], STEPS, {"trained": 40.0})


# Tables


def test_what_is_piped_is_the_plain_text(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show("plain text", table(["", "full"], [("loss", "1")]))
    assert capsys.readouterr().out == "plain text\n"


def test_a_dumb_terminal_gets_the_plain_text(opened, monkeypatch):
    terminal = opened()
    monkeypatch.setenv("TERM", "dumb")
    show("plain text", table(["", "full"], [("loss", "1")]))
    assert terminal.getvalue() == "plain text\n"


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_a_table_in_colour_unless_it_asks_for_none(plain, opened, monkeypatch):
    terminal = opened()
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    checks = [Check("files", True, "as emitted"), Check("base", False, "another one")]
    show("plain text", checked(checks), marked("1 of 2 checks FAILED"))
    assert [line.split() for line in terminal.text.splitlines()] == [
        ["pass", "files", "as", "emitted"],
        ["FAIL", "base", "another", "one"],
        ["1", "of", "2", "checks", "FAILED"],
    ]
    assert bool(COLOUR.search(terminal.getvalue())) != plain


def test_a_table_fits_the_terminal_and_loses_nothing(opened):
    terminal = opened()
    long = "a/" * 60
    show("", table(["metric", "full"], [(long, "0.5")]), named({"read": long}))
    assert max(map(len, terminal.text.splitlines())) <= 90
    assert len(re.findall("[a/]", terminal.text.replace("read", "").replace("metric", ""))) == 2 * len(long)


def test_a_text_of_others_neither_moves_the_cursor_nor_is_markup(opened):
    terminal = opened()
    show("", named({"name": "[red]x[/red] \x1b[2J :smile:"}))
    assert "[red]x[/red] \\x1b[2J :smile:" in terminal.text
    assert "\x1b[2J" not in terminal.getvalue()


def test_the_table_of_an_evaluation_is_the_same_text_as_ever(monkeypatch):
    values = {"full": {"a": {"loss": 0.5, "probability": 1 / 3}}, "unlearned": {"a": {"loss": 12.0}}}
    monkeypatch.setattr(evaluate, "summary", dict)
    assert evaluate._text(list(evaluate._cells(values))) == (
        "                     full     unlearned\n"
        "loss                  0.5            12\n"
        "probability        0.3333             -"
    )


def test_the_methods_of_a_comparison_are_a_table(opened):
    terminal = opened()
    main(["compare", "--list"])
    assert max(map(len, terminal.text.splitlines())) <= 90
    words = terminal.text.split()
    assert words[:3] == ["method", "needs", "description"]
    assert set(METHODS) <= set(words)


def test_the_attacks_of_an_evaluation_are_a_table_and_say_what_was_skipped(opened):
    values = {"loss": 3.0}
    results = [
        AttackResult("as-asked", "as it is", values, {"loss": 0.5}, None),
        AttackResult("hops", "", {}, None, None, skipped="no row names anyone"),
    ]
    terminal = opened()
    evaluate._show_attacks(results)
    found = [line.split() for line in terminal.text.splitlines() if line.strip("─- ")]
    assert found == [
        ["attack", "setting", "measure", "unlearned", "retain-only", "full"],
        ["as-asked", "as", "it", "is", "loss", "3.000", "-", "0.500"],
        ["hops", "was", "skipped:", "no", "row", "names", "anyone"],
    ]


# A job


def test_a_job_is_one_display(opened):
    terminal = opened()
    shown = plan()
    with JobDisplay() as display:
        display.say(shown)
        display.say(Begun(shown, STEPS[0], 2, 3))
        assert sys.stdout is not terminal
        print("{'loss': '1.5'}")
        with tqdm(total=10, desc="rows", file=sys.stderr) as bar:
            bar.update(5)
            bar.refresh()
            tqdm.write("a weight is left as it is", file=sys.stderr)
            display._live.refresh()
            assert display._bars.last.startswith("rows:  50%")
        assert display._bars.last == ""
        shown.took["trained"] = 130.0
        display.say(Begun(shown, STEPS[1], 3, 3))
        display.say("done in 2 min")
    assert sys.stdout is terminal
    assert "job: M must forget F\neverything goes to out\n\n" in terminal.text
    assert "a weight is left as it is\n" in terminal.text
    assert re.search(r"step 2 of 3 .* about 40 s left, and the time of judging\s+rows: +50%", terminal.text)
    assert "{'loss': '1.5'}" in terminal.text
    last = terminal.text.rstrip().splitlines()[-3:]
    assert [line.split() for line in last] == [
        ["✓", "train", "it", "2", "min", "trained"],
        ["judge", "it", "unknown", "judged.json"],
        ["done", "in", "2", "min"],
    ]
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l"), "the cursor is there"


def test_a_job_that_fails_gives_the_terminal_back(opened):
    terminal = opened()
    errors = sys.stderr
    with pytest.raises(KeyboardInterrupt), JobDisplay() as display:  # noqa: PT012 - the display is under test
        display.say(plan())
        raise KeyboardInterrupt
    assert (sys.stdout, sys.stderr) == (terminal, errors)


def test_errors_that_go_to_a_file_stay_there(opened, monkeypatch):
    terminal = opened()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with JobDisplay() as display:
        display.say(plan())
        print("a note", file=sys.stderr)
    assert sys.stderr.getvalue() == "a note\n"
    assert "a note" not in terminal.text


def test_the_time_left_shrinks_while_a_step_runs_and_follows_how_long_others_took():
    shown = Plan([], STEPS, {"trained": 40.0, "judged.json": 10.0})
    assert shown.left("trained") == "about 50 s left, and the time of judging"
    assert shown.left("trained", elapsed=30.0) == "about 20 s left, and the time of judging"
    assert shown.left("trained", elapsed=70.0) == "about 10 s left, and the time of judging"
    shown.took["trained"] = 80.0
    assert shown.left("judged.json", elapsed=5.0) == "about 15 s left, and the time of judging"
    assert plan().left("judged.json") == ""
