"""Every row of the package's tables has a row in ours, so that the laws run over it."""

import tables

from peft_perta.evaluation import ATTACKS, METRICS, SUITES
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


def test_every_metric_has_a_row():
    assert set(METRICS) == set(tables.METRICS)


def test_every_suite_has_a_row():
    assert set(SUITES) == set(tables.SUITES)


def test_every_attack_has_a_row():
    assert set(ATTACKS) == set(tables.ATTACKS)


def test_every_row_is_filed_under_its_own_name():
    named = (WEIGHTINGS, GRANULARITIES, FITS, SUITES, ATTACKS)
    assert all(name == row.name for table in named for name, row in table.items())


def test_every_suite_names_metrics_of_the_table():
    for suite in SUITES.values():
        assert {*suite.shown_answers.values(), *suite.retain_only_metrics} <= set(METRICS)
