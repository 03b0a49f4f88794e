"""Every row of the package's tables has a row in tests/tables.py, so that the laws run over it."""

import pytest
import tables

from peft_perta.gradients import MODES
from peft_perta.model import LAYER_KINDS
from peft_perta.perta import FITS, GRANULARITIES, WEIGHTINGS
from peft_perta.training import COMBINERS, FORGET_LOSSES, RETAIN_LOSSES

DESCRIBED = {"weighting": WEIGHTINGS, "granularity": GRANULARITIES, "fit": FITS}  # a person chooses among these


def test_every_layer_kind_has_a_row():
    assert {kind.name for kind in LAYER_KINDS} == set(tables.LAYERS)


def test_every_weighting_has_a_row():
    assert set(WEIGHTINGS) == set(tables.WEIGHTINGS)


def test_every_granularity_has_a_row():
    assert set(GRANULARITIES) == set(tables.GRANULARITIES)


def test_every_fit_has_a_row():
    assert set(FITS) == set(tables.FITS)


def test_every_mode_has_a_row():
    assert set(MODES) == set(tables.MODES)


def test_every_row_is_filed_under_its_own_name():
    for table in (WEIGHTINGS, GRANULARITIES, FITS, MODES):
        assert all(name == row.name for name, row in table.items())


@pytest.mark.parametrize("table", DESCRIBED)
def test_every_choice_describes_itself_in_one_line(table):
    for name, row in DESCRIBED[table].items():
        assert 10 < len(row.description) < 100, f"the {table} {name!r} needs a one-line description"
        assert not row.description.endswith("."), name
        assert "\n" not in row.description, name


def test_every_loss_has_a_row_and_says_what_it_is():
    losses = FORGET_LOSSES | RETAIN_LOSSES
    assert len(losses) == len(FORGET_LOSSES) + len(RETAIN_LOSSES)
    assert set(losses) == set(tables.LOSSES), "tests/tables.py, LOSSES"
    assert all(name == loss.name and loss.description for name, loss in losses.items())


def test_every_combiner_has_a_row_and_says_what_it_is():
    assert set(COMBINERS) == set(tables.COMBINERS), "tests/tables.py, COMBINERS"
    assert all(name == combiner.name and combiner.description for name, combiner in COMBINERS.items())
