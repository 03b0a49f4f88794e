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
from peft_perta.cli import main

FURTHER = {"forget": "--epochs 1"}
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Adapters and rows, as commands need them."""
    place = tmp_path_factory.mktemp("intact")
    model = builders.adapted_saved_llama()
    model.save_pretrained(place)
    rows = {"forget": builders.forget_rows(), "retain": builders.retain_rows()}
    for name, of_file in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_file)))
    save_perta_adapter(place / "mine", *builders.negate(model, weighting="uniform"))
    return place


def arguments_of(command, place):
    filled = COMMANDS[command].format(place=place, adapter=place / "mine")
    more = FURTHER.get(command, "").format(place=place)
    base = str(builders.llama_directory())
    return [command, "--model", base, *filled.split(), *more.split(), "--output", str(place / "out")]


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
            sys.stdout = sys.stderr = open(place.parent / "printed.txt", "w", encoding="utf-8")  # noqa: SIM115
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
            left[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["forget", "unlearn", "calibrate", "refine", "extrapolate"])
def test_killed_at_each_change_of_a_file_and_run_again(command, intact, tmp_path):
    place = tmp_path / "place"

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
