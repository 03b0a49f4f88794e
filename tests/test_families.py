"""Every family of models runs the same commands, exactly, or is refused with a remedy; docs/models.md has the table."""

from pathlib import Path

import families
import family_models
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BY_SPEED = [
    name if name in families.QUICK else pytest.param(name, marks=pytest.mark.slow) for name in family_models.BUILDERS
]


@pytest.mark.parametrize("name", BY_SPEED)
def test_a_family_runs_every_command_or_is_refused_with_a_remedy(name, tmp_path):
    families.check_family(name, tmp_path)


def test_every_family_has_a_model_and_every_model_a_family():
    assert list(families.FAMILIES) == list(family_models.BUILDERS)
    assert set(families.QUICK) <= set(families.FAMILIES)


def test_the_page_shows_the_table():
    assert families.table() in PAGE.read_text(), "print the table with `python -m tests.families`"


def test_the_script_says_what_is_not_as_expected(monkeypatch, capsys):
    odd = families.Family(refused={"forget": families.Refusal("no such line", "odd")})
    monkeypatch.setitem(families.FAMILIES, "Qwen2", odd)
    assert families.check_families(["Qwen2"]) == 1
    said = capsys.readouterr()
    assert "NOT AS EXPECTED: Qwen2: Qwen2: forget" in said.err
    assert said.out.startswith("| family |")
