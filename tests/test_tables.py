"""Every row of the package's tables has a row in tests/tables.py, so that the laws run over it."""

import pytest
import tables

from peft_perta.adapters import EXPORTS
from peft_perta.comparison import METHODS
from peft_perta.evaluation import ATTACKS, METRICS, SUITES
from peft_perta.gradients import MODES
from peft_perta.model import LAYER_KINDS
from peft_perta.perta import FITS, GRANULARITIES, WEIGHTINGS
from peft_perta.training import COMBINERS, FORGET_LOSSES, RETAIN_LOSSES

LOSSES = FORGET_LOSSES | RETAIN_LOSSES
# Table -> the package's rows by name, and the name of the tests' table.
TABLES = {
    "LAYER_KINDS": ({kind.name: kind for kind in LAYER_KINDS}, "LAYER_ROWS"),
    "MODES": (MODES, "MODES"),
    "WEIGHTINGS": (WEIGHTINGS, "WEIGHTINGS"),
    "GRANULARITIES": (GRANULARITIES, "GRANULARITIES"),
    "FITS": (FITS, "FITS"),
    "FORGET_LOSSES and RETAIN_LOSSES": (LOSSES, "LOSSES"),
    "COMBINERS": (COMBINERS, "COMBINERS"),
    "METRICS": (METRICS, "METRICS"),
    "SUITES": (SUITES, "SUITES"),
    "ATTACKS": (ATTACKS, "ATTACKS"),
    "EXPORTS": (EXPORTS, "EXPORTS"),
}
# A person chooses among these, so each row describes itself.
DESCRIBED = {
    "weighting": WEIGHTINGS,
    "granularity": GRANULARITIES,
    "fit": FITS,
    "loss": LOSSES,
    "combiner": COMBINERS,
    "method": METHODS,
    "export": EXPORTS,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_sibling_has_a_row_in_the_tests(table):
    rows, name = TABLES[table]
    ours = set(getattr(tables, name))
    assert set(rows) <= ours, f"tests/tables.py, {name}: add a row for {sorted(set(rows) - ours)}"
    assert ours <= set(rows), f"tests/tables.py, {name}: {sorted(ours - set(rows))} is in no table of the package"


def test_no_name_is_both_a_forget_loss_and_a_retain_loss():
    assert len(LOSSES) == len(FORGET_LOSSES) + len(RETAIN_LOSSES)


@pytest.mark.parametrize("table", [name for name in TABLES if name != "METRICS"])
def test_every_row_is_filed_under_its_own_name(table):
    assert all(name == row.name for name, row in TABLES[table][0].items())


@pytest.mark.parametrize("table", DESCRIBED)
def test_every_choice_describes_itself_in_one_line(table):
    for name, row in DESCRIBED[table].items():
        assert 10 < len(row.description) <= 130, f"the {table} {name!r} needs a one-line description"
        assert not row.description.endswith("."), name
        assert "\n" not in row.description, name


def test_every_suite_names_metrics_of_the_table():
    for suite in SUITES.values():
        assert {*suite.shown_answers.values(), *suite.retain_only_metrics} <= set(METRICS)
