"""Every row of the package's tables has a row in ours, so that the laws run over it."""

import tables

from peft_perta.model import LAYER_KINDS
from peft_perta.perta import FIT_NAMES, FITS, GRANULARITIES, GRANULARITY_NAMES, WEIGHTINGS


def test_every_layer_kind_has_a_row():
    assert {kind.name for kind in LAYER_KINDS} == set(tables.LAYERS)


def test_every_weighting_has_a_row():
    assert set(WEIGHTINGS) == set(tables.WEIGHTINGS)


def test_every_granularity_has_a_row_and_a_name_in_the_config():
    assert set(GRANULARITIES) == set(tables.GRANULARITIES) == set(GRANULARITY_NAMES)


def test_every_fit_has_a_row_and_a_name_in_the_config():
    assert set(FITS) == set(tables.FITS) == set(FIT_NAMES)


def test_every_row_is_filed_under_its_own_name():
    assert all(name == row.name for table in (WEIGHTINGS, GRANULARITIES, FITS) for name, row in table.items())
