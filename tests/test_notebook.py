"""The notebook: valid, up to date with the code, and it runs."""

import ast
import importlib
import json
import os
from pathlib import Path

import pytest
from children import Child
from test_docs import few_rows

from peft_perta.job import Unlearned

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_that_ran_from_top_to_bottom():
    """What nbformat 4.5 asks for, and outputs of one run, without errors."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    cells = NOTEBOOK["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        of_kind = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"id", "cell_type", "metadata", "source", *of_kind}
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    assert {output["output_type"] for cell in ran for output in cell["outputs"]} == {"stream", "execute_result"}
    shown = next(output for cell in ran for output in cell["outputs"] if output["output_type"] == "execute_result")
    assert "The goal was met." in "".join(shown["data"]["text/html"])
    assert str(Path.home()) not in json.dumps(ran)
    assert os.sep + "tmp" + os.sep not in json.dumps(ran)


def test_it_names_what_there_is():
    tree = ast.parse("\n".join(CODE))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert len(imports) == 3
    for node in imports:
        assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "result"
    }
    assert used == {"adapter", "evaluation"}
    assert used <= set(Unlearned.__dataclass_fields__)


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path):
    """In one namespace, on few rows."""
    assets = few_rows(tmp_path / "assets", forget=85, retain=8)
    (assets / "retain_adapter").symlink_to(ROOT / "peft_perta/comparison/assets/retain_adapter")
    code = "\n".join(CODE)
    for long, short in (
        ("from peft_perta.comparison import ASSETS", f"ASSETS = {str(assets)!r}"),
        ("show_progress_bar=False,\n)", "show_progress_bar=False,\n    train={'epochs': 3.0},\n)"),
    ):
        assert long in code
        code = code.replace(long, short, 1)
    (tmp_path / "notebook.py").write_text(f"{code}\nprint(result)\n", encoding="utf-8")
    assert "forgotten    loss on the forget rows" in Child(["notebook.py"], tmp_path).finished()
