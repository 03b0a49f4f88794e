"""What the docs show, runs."""

import re
import shlex
from pathlib import Path

import pytest
from children import Child

from peft_perta.cli import command_parser
from peft_perta.comparison import ASSETS
from peft_perta.training import FORGET_LOSSES, RETAIN_LOSSES

ROOT = Path(__file__).parents[1]


def test_readme_quickstart(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    quickstart = next(block for block in blocks if "train_forget_adapter" in block)
    assert len([line for line in quickstart.splitlines() if line.strip()]) <= 20
    # The same code on fewer epochs and rows: the suite wants the path, the reader the result.
    assets = few_rows(tmp_path / "assets", forget=6, retain=16)
    for long, short in (
        ("from peft_perta.comparison import ASSETS", f"ASSETS = {str(assets)!r}"),
        ("forget, tokenizer)", "forget, tokenizer, num_train_epochs=2)"),
    ):
        assert long in quickstart
        quickstart = quickstart.replace(long, short, 1)
    (tmp_path / "quickstart.py").write_text(quickstart + "assert model.active_adapters == ['task', 'perta_unlearn']\n")
    Child(["quickstart.py"], tmp_path).finished()
    assert (tmp_path / "unlearn_adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "unlearn_adapter" / "strength.json").is_file()


def few_rows(directory: Path, **rows: int) -> Path:
    """The demo's assets with the first rows of each set alone."""
    directory.mkdir()
    for name in ("base", "task_adapter"):
        (directory / name).symlink_to(ASSETS / name)
    for name, count in rows.items():
        lines = (ASSETS / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (directory / f"{name}.jsonl").write_text("".join(lines[:count]))
    return directory


EXAMPLES = {
    "01_quickstart.py": ["--epochs", "1", "--rows", "8", "--judged-rows", "2"],
    "02_qlora.py": [
        *["--model", str(ASSETS / "base"), "--task-adapter", str(ASSETS / "task_adapter"), "--samples", "4"],
        *["--forget", str(ASSETS / "forget.jsonl"), "--retain", str(ASSETS / "retain.jsonl"), "--epochs", "1"],
        *["--rows", "8", "--judged-rows", "4"],
    ],
    "03_own_weighting.py": ["--epochs", "1", "--rows", "8", "--samples", "4", "--judged-rows", "2"],
    "04_ship.py": ["--epochs", "2", "--rows", "2", "--retain-rows", "8"],
    "05_muse.py": ["--epochs", "1", "--rows", "2", "--max-new-tokens", "8"],
    "06_train.py": ["--epochs", "1", "--rows", "4", "--four-bit"],
    "07_erase.py": [
        *["--rows", "4", "--iterations", "2", "--curvature-samples", "8", "--training-rows", "16"],
        *["--judged-rows", "4", "--four-bit"],
    ],
    "08_extrapolate.py": ["--epochs", "1", "--rows", "4", "--four-bit"],
    "09_trl_parser.py": [
        *["--config", str(ROOT / "examples/09_trl_parser.yaml"), "--num_train_epochs", "1", "--rows", "4"],
        *["--lora_r", "2"],
    ],
}


QUICK = {"06_train.py"}  # the README's quickstart is run too; the others take a minute each


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(EXAMPLES)]
)
def test_example_runs(name, tmp_path):
    output = Child([str(ROOT / "examples" / name), *EXAMPLES[name]], tmp_path).finished()
    assert "forget" in output


def test_every_example_is_tested_short_and_opens_with_a_question():
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert {script.name for script in scripts} == set(EXAMPLES)
    for script in scripts:
        lines = script.read_text().splitlines()
        assert len(lines) <= 120
        assert lines[0].startswith('"""')
        assert lines[0].endswith("?")


def test_readme_names_the_two_commands_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in readme
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_relative_links_of_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_page_on_training_has_every_loss():
    page = (ROOT / "docs" / "training.md").read_text()
    assert not [name for name in FORGET_LOSSES | RETAIN_LOSSES if f"`{name}`" not in page]


def commands_of(page: Path) -> list[str]:
    """The whole command lines in a page's code blocks, without comments and optional parts."""
    lines = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\[[^\]]*\]", "", line.partition(" #")[0]).strip()
            if not language and command.startswith("peft-perta ") and "..." not in command:
                lines.append(command)
    return lines


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md", "docs/ledger.md", "docs/run.md"])
def test_the_command_lines_of_the_docs_are_understood(page):
    commands = commands_of(ROOT / page)
    assert len(commands) >= 3
    for command in commands:
        name, *options = shlex.split(command)[1:]
        assert command_parser(name).parse_args(options), command
