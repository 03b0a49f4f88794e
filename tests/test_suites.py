"""What every suite says of itself."""

import pytest
import tables

from peft_perta.evaluation import SUITES, forget_rows


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_names_its_log_and_its_forget_rows(name):
    suite, row = SUITES[name], tables.SUITES[name]
    assert suite.file_name == row.file_name
    assert (suite.forget_split is None) == (row.row is None)
    if row.row is not None:
        assert forget_rows({name: {suite.forget_split: [row.row]}}) == [{**row.row, "question": row.question}]


def test_forget_rows_are_those_of_the_first_suite_that_has_any():
    splits = {
        "rwku": {"forget_level2": [{"query": "A?", "answer": "a"}]},
        "choices": {"wmdp": [{"question": "B?"}]},
        "muse": {"forget_knowmem": [{"question": "C?", "answer": "c"}]},
    }
    assert forget_rows(splits) == splits["muse"]["forget_knowmem"]
    assert forget_rows({"choices": splits["choices"]}) == []
