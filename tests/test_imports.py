"""Importing the package and showing its help import no heavy library; every public name is imported when it is used."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import peft_perta
from peft_perta.cli import COMMANDS

HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "matplotlib")


def imported_after(program: str, *more: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has imported after the program."""
    report = f"import sys; sys.stderr.write(' '.join(set({HEAVY}) & set(sys.modules)))"
    command = [sys.executable, "-c", f"{program}\n{report}", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return set(done.stderr.split())


def test_the_probe_sees_what_is_imported():
    assert imported_after("import torch") >= {"torch"}


@pytest.mark.parametrize(
    "program",
    [
        "import peft_perta; dir(peft_perta)",
        "from peft_perta import PerTAError, ConfigError",
        "import peft_perta.cli",
        "from peft_perta.cli import main\ntry: main(['--help'])\nexcept SystemExit as exit: assert exit.code == 0",
    ],
)
def test_nothing_heavy_is_imported(program):
    assert imported_after(program) == set()


def test_an_unknown_command_imports_nothing_heavy():
    program = "import sys; sys.stderr = sys.stdout\nfrom peft_perta.cli import main\ntry: main(['unlern'])"
    assert imported_after(f"{program}\nexcept SystemExit: pass\nsys.stderr = sys.__stderr__") == set()


def test_bitsandbytes_is_quiet_before_it_is_imported():
    program = (
        "import peft_perta, logging\nassert logging.getLogger('bitsandbytes.backends.cpu.ops').level == logging.ERROR\n"
    )
    assert "bitsandbytes" not in imported_after(program)


def test_the_lists_of_public_names_agree():
    """What is exported, what is imported on use, and what type checkers see."""
    tree = ast.parse(Path(peft_perta.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == peft_perta._ROOMS
    assert list(peft_perta._ROOMS) == peft_perta.__all__
    assert set(peft_perta.__all__) <= set(dir(peft_perta))


def test_a_star_import_gives_every_public_name():
    names: dict = {}
    exec("from peft_perta import *", names)
    for name in peft_perta.__all__:
        assert names[name] is getattr(peft_perta, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'peft_perta' has no attribute 'PerTAconfig'"):
        peft_perta.PerTAconfig  # noqa: B018


def test_public_classes_can_be_pickled():
    config = peft_perta.PerTAConfig(rank=4)
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(peft_perta.ConfigError)) is peft_perta.ConfigError


def test_every_command_is_a_module_of_its_name():
    folder = Path(peft_perta.__file__).parent / "cli"
    assert {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} == set(COMMANDS)
