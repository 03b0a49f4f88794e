"""Names that others chose reach cards, pages and terminals as what they are: text."""

import ast
import re
import sys
from pathlib import Path

import builders
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from peft_perta import load_provenance, save_perta_adapter
from peft_perta.adapters.model_card import model_card
from peft_perta.adapters.provenance.record import code_span
from peft_perta.cli import main
from peft_perta.data import visible

HOSTILE = [
    'x"); import os; os.system("true',
    "x\n---\nlicense: mit\n---",
    "a`; <script>alert(1)</script>",
    "``` \n# Heading",
    "\x1b[2J\x1b[31mred",
    "\u202egpj.exe",
    "org/name: &a [b",
    "a|b|c",
]


@pytest.fixture(scope="module")
def emitted():
    return builders.negate(
        builders.with_adapters(builders.llama(), builders.lora_config(["q_proj"])), weighting="uniform"
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_the_base_stays_a_name_in_the_card(name, emitted):
    provenance = emitted.provenance
    base = {**provenance.base_model, "name": name, "auto_class": "os.system"}
    card = model_card(type(provenance)(**{**vars(provenance), "base_model": base}))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "as-the-base-model",
        "tags": ["lora", "peft", "unlearning", "perta"],
    }
    (code,) = re.findall(r"```python\n(.*?)\n```", body, re.DOTALL)
    loading = ast.parse(code).body[2]
    assert isinstance(loading, ast.Assign)
    assert ast.unparse(loading) == f"model = AutoModelForCausalLM.from_pretrained({name!r})"
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# Negative adapter"]


def test_a_directory_is_no_name_of_the_hub(emitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    provenance = emitted.provenance
    card = lambda: model_card(  # noqa: E731
        type(provenance)(**{**vars(provenance), "base_model": {**provenance.base_model, "name": "models/tiny"}})
    )
    assert "base_model: models/tiny" in card()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert "base_model: " not in card()


@given(st.text())
@example("`")
@example("a``b`")
def test_a_code_span_is_one_span_in_one_cell(text):
    span = code_span(text)
    fence = re.match("`+", span).group()
    inner = span.removeprefix(fence).removesuffix(fence)
    assert fence not in re.findall("`+", inner)
    assert "\n" not in span
    assert not re.search(r"(?<!\\)\|", inner)


@given(st.text())
def test_what_is_shown_is_printable_and_plain_text_stays(text):
    assert all(c.isprintable() or c == "\n" for c in visible(text))
    assert visible("Ångström 日本\n") == "Ångström 日本\n"


def test_a_provenance_with_escape_sequences_does_not_reach_the_terminal(emitted, tmp_path, capsys):
    path = save_perta_adapter(tmp_path / "out", *emitted)
    file = path / "perta_provenance.json"
    file.write_text(file.read_text().replace('"name": "forget"', r'"name": "\u001b[2Jforget"'))
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert load_provenance(path)[0].forget_adapter["name"] == r"\x1b[2Jforget"


def test_an_error_that_nobody_foresaw_is_one_line_that_names_its_traceback(monkeypatch, capsys, tmp_path):
    def fails(options):
        raise ZeroDivisionError("deep\nwithin \x1b[2J")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("peft_perta.cli.inspect.run", fails)
    monkeypatch.setattr(sys, "argv", ["peft-perta", "inspect", "x"])
    assert main(["inspect", "x"]) == 3
    printed = capsys.readouterr().err
    (line,) = printed.splitlines()
    assert line.startswith("peft-perta: error: ZeroDivisionError: deep within")
    assert "\x1b" not in line
    (log,) = tmp_path.glob("peft-perta-*.log")
    assert str(log) in line
    assert "Traceback (most recent call last)" in Path(log).read_text()
