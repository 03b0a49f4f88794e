"""Every row of the package's tables has a row in ours, so that the laws run over it."""

import tables

from peft_perta.model import LAYER_KINDS
from peft_perta.perta import FIT_NAMES, FITS, GRANULARITIES, GRANULARITY_NAMES, WEIGHTINGS
from peft_perta.training import COMBINERS, FORGET_LOSSES, RETAIN_LOSSES


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


def test_every_loss_has_a_row_and_says_what_it_is():
    losses = FORGET_LOSSES | RETAIN_LOSSES
    assert len(losses) == len(FORGET_LOSSES) + len(RETAIN_LOSSES)
    assert set(losses) == set(tables.LOSSES), "tests/tables.py, LOSSES"
    assert all(name == loss.name and loss.description for name, loss in losses.items())


def test_every_combiner_has_a_row_and_says_what_it_is():
    assert set(COMBINERS) == set(tables.COMBINERS), "tests/tables.py, COMBINERS"
    assert all(name == combiner.name and combiner.description for name, combiner in COMBINERS.items())
