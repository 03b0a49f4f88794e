"""Every row of the package's tables has a row in tests/tables.py, so that the laws run over it."""

import pytest
import tables

from peft_perta.gradients import MODES
from peft_perta.model import LAYER_KINDS
from peft_perta.perta import FITS, GRANULARITIES, WEIGHTINGS

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
