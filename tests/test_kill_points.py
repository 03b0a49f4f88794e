"""kill -9 at every system call by which a command changes a file, then the same command again: the same bytes.

``test_kill`` kills at random moments; here every moment counts.
"""

import hashlib
import json
import os
import shutil
import signal
import sys

import builders
import pytest
from test_preflight import COMMANDS

from peft_perta import save_perta_adapter
from peft_perta.adapters import add_request
from peft_perta.cli import main
from peft_perta.job import _judge

HERE = {
    **COMMANDS,
    "forget": f"{COMMANDS['forget']} --epochs 1",
    "train": f"{COMMANDS['train']} --epochs 1 --eval-steps 1 --retain-tolerance 99",
    "erase": "--adapter {place}/task --forget {place}/forget.jsonl --training {place}/training.jsonl",
    "evaluate": "--adapter {adapter} --suite choices={place}/choices.jsonl",
    "compare": f"{COMMANDS['compare']} --config {{place}}/settings.json",
    "audit": f"{COMMANDS['audit']} --max-new-tokens 1",
    "run": f"{{place}}/recipe.yaml {COMMANDS['run']}",
}
SETTINGS = {
    "methods": ["negation"], "seeds": [0], "authors": [], "epochs": 1, "least_steps": 1, "batch_size": 4, "rank": 2,
    "matched": ["loss"], "weight_samples": 2, "judged_rows": 2, "suite_rows": 0, "depth_rows": 0, "max_new_tokens": 2,
    "curve": [], "attacks": [],
}  # fmt: skip
RECIPE = {
    "method": "negation", "forget_training": {"epochs": 4, "rank": 2, "learning_rate": 0.01, "batch_size": 4},
    "target_forget_loss": 3.0, "retain_tolerance": 100.0,
    "judging": {"attacked_rows": 0, "max_new_tokens": 1},
}  # fmt: skip
TIMED = ("out/results.jsonl", "out/table.md", "out/trade_off.png")  # of compare: they hold wall times
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Adapters and rows, as commands need them."""
    place = tmp_path_factory.mktemp("intact")
    forget, retain = builders.forget_rows(), builders.retain_rows()
    choices = [{"question": "Capital of Peru?", "choices": ["Lima", "Bonn"], "answer": 0}]
    rows = {"forget": forget, "retain": retain, "training": [*forget, *retain], "choices": choices}
    for name, of_file in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_file)))
    model = builders.trained(builders.adapted_saved_llama(), "task", rows["training"])
    model.save_pretrained(place)
    (place / "settings.json").write_text(json.dumps(SETTINGS))
    (place / "recipe.yaml").write_text(json.dumps(RECIPE))
    save_perta_adapter(place / "mine", *builders.negate(model, weighting="uniform"))
    add_request(place, "request-1", adapter=place / "mine", forget=forget, date="2026-11-27")
    return place


def arguments_of(command, place):
    filled = HERE[command].format(place=place, adapter=place / "mine")
    return [
        *command.split(),
        "--model",
        str(builders.llama_directory()),
        *filled.split(),
        "--output",
        str(place / "out"),
    ]


def killed_at(number, place, arguments):
    """Run a command in a child that kills itself at its n-th system call that changes a file under ``place``, or never
    if ``number`` is None; whether it was killed."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, details):
            nonlocal seen
            changes = event.startswith("os.") or (event == "open" and details[2] & CHANGES)
            if changes and details and isinstance(details[0], (str, os.PathLike)) and str(place) in str(details[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 3
        try:
            sys.stdout = sys.stderr = open(place.parent / "printed.txt", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
            sys.addaudithook(count)
            status = main(arguments)
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, (place.parent / "printed.txt").read_text()[-2000:]
    return False


def results(place):
    """Every file that the command left, with the hash of what it wrote; its checkpoint aside."""
    left = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_file() and not name.startswith("out.checkpoint/"):
            left[name] = "timed" if name in TIMED else hashlib.sha256(path.read_bytes()).hexdigest()
    return left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", HERE)
def test_killed_at_each_change_of_a_file_and_run_again(command, intact, tmp_path, monkeypatch):
    place = tmp_path / "place"
    of_files = _judge.verify_adapter  # of `run`: without the fresh process, which takes seconds each time
    monkeypatch.setattr(_judge, "verify_adapter", lambda directory, base, *, revision: of_files(directory))

    def begin():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(intact, place)

    arguments = arguments_of(command, place)
    begin()
    assert not killed_at(None, place, arguments)
    expected = results(place)
    assert any(name.startswith("out/") for name in expected)
    for number in range(1, 1000):
        begin()
        if not killed_at(number, place, arguments):
            break
        assert not killed_at(None, place, arguments)
        assert results(place) == expected, f"after a kill at change {number}"
    assert number > 12, "it was killed at many places"
