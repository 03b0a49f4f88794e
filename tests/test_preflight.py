"""Every command that writes refuses what it must before it computes, and leaves all files as they were."""

import hashlib
import json
import os
import shlex
import subprocess
import sys

import builders
import pytest
import torch

from peft_perta import save_perta_adapter
from peft_perta.adapters import add_request
from peft_perta.cli import main
from peft_perta.gradients import Checkpoint

ROWS = {"forget": "--forget {place}/forget.jsonl", "retain": "--retain {place}/retain.jsonl"}
BOTH = f"{ROWS['forget']} {ROWS['retain']}"
COMMANDS = {  # command -> its options, beside the model and the output
    "forget": f"{ROWS['forget']} --rank 2",
    "unlearn": f"--forget-adapter {{place}}/forget {BOTH}",
    "calibrate": f"--adapter {{adapter}} {BOTH} --retain-tolerance 0.1",
    "refine": f"--adapter {{adapter}} {BOTH}",
    "extrapolate": "--adapter {adapter} --alpha 0.5",
    "train": BOTH,
    "erase": f"--adapter {{place}}/task {ROWS['forget']} --training {{place}}/retain.jsonl",
    "evaluate": "--adapter {adapter} --suite choices={place}/forget.jsonl",
    "compare": f"{BOTH} --task-adapter {{place}}/task",
    "audit": f"{BOTH} --adapter {{place}}/task --adapter {{adapter}}",
    "run": f"{BOTH} --task-adapter {{place}}/task",
    "fuse": "{place}/task {adapter}:0.5",
    "ledger rebuild": f"{{place}} {BOTH} --retain-tolerance 0.1",
    "merge": "{place}/task {adapter}",
    "export": "{place}/task {adapter} --to mlx",
}
GROWING = ("evaluate", "compare", "audit", "run")  # they write file by file
OTHER_FILES = ("merge", "export")  # they take adapters, and write no directory of one
REPLACING = [name for name in COMMANDS if name not in GROWING]
TAKE_AN_ADAPTER = ["calibrate", "refine", "extrapolate", "fuse", "merge", "export"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A forget and a task adapter, an emitted one in ``mine``, and rows. No forward may run."""
    model = builders.adapted_saved_llama()
    model.save_pretrained(tmp_path)
    for name, rows in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_perta_adapter(tmp_path / "mine", *builders.negate(model, weighting="uniform"))
    add_request(tmp_path, "request-1", adapter=tmp_path / "mine", forget=tmp_path / "forget.jsonl", date="2026-11-27")
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    return tmp_path


def tree(place):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(place.rglob("*"))
    }


def refused(place, command, output, message, capsys, adapter=None, **options):
    filled = COMMANDS[command].format(place=place, adapter=adapter or place / "mine")
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    before = tree(place)
    model = ["--model", str(builders.llama_directory())]
    arguments = [*command.split(), *model, *filled.split(), *more, "--output", str(output)]
    assert main(arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert tree(place) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_is_refused(command, place, capsys):
    (place / "link").symlink_to(place / "nowhere")
    refused(place, command, place / "link", "is a link, expected a new directory", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_of_others_is_refused(command, place, capsys):
    (place / "theirs").mkdir()
    (place / "theirs" / "thesis.tex").write_text("years of work")
    refused(place, command, place / "theirs", "was not written by peft_perta", capsys)


@pytest.mark.parametrize("command", [name for name in REPLACING if name not in ("forget", *OTHER_FILES)])
def test_rows_in_the_output_are_refused(command, place, capsys):
    rows = place / "mine" / "rows.jsonl"
    rows.write_text((place / "forget.jsonl").read_text())
    refused(place, command, place / "mine", "rows.jsonl in it was not written by peft_perta", capsys)


@pytest.mark.parametrize("command", [name for name in TAKE_AN_ADAPTER if name not in OTHER_FILES])
def test_an_adapter_that_is_the_output_is_refused(command, place, capsys):
    refused(place, command, place / "mine", "mine", capsys)
    refused(place, command, place / "mine", "is in the output", capsys, adapter=f"{place}/./mine")


@pytest.mark.parametrize(
    ("arguments", "written"),
    [(["compare", "--list", "--json"], "methods.json"), (["rescore", "log.json", "--output"], "aggregates.json")],
    ids=["compare", "rescore"],
)
def test_a_file_is_replaced_only_if_asked(arguments, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.json").write_text(
        json.dumps({"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.69}}}})
    )
    (tmp_path / written).write_text("years of work")
    assert main([*arguments, written]) == 2
    assert f"{written} exists; add --overwrite to replace it" in capsys.readouterr().err
    assert (tmp_path / written).read_text() == "years of work"
    assert main([*arguments, written, "--overwrite"]) == 0
    assert (tmp_path / written).read_text() != "years of work"


def test_uniform_weights_leave_the_checkpoint_of_another_run_alone(place):
    checkpoint = Checkpoint(place / "out.checkpoint", {"format": 1, "of": "another run"})
    checkpoint.save("a", {}, {})
    del checkpoint
    model, adapter = str(builders.llama_directory()), str(place / "forget")
    command = ["unlearn", "--model", model, "--forget-adapter", adapter, "--weighting", "uniform"]
    assert main([*command, "--output", str(place / "out")]) == 0
    assert (place / "out.checkpoint" / "a.safetensors").is_file()


def test_a_missing_lm_eval_is_told_before_a_forward(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("peft_perta.cli.evaluate.load_model", lambda options: pytest.fail("a model was loaded"))
    options = {"lm-eval": "hellaswag"}
    (place / "forget.jsonl").write_text(
        json.dumps({"question": "Capital of Peru?", "choices": ["Lima", "Bonn"], "answer": 0})
    )
    refused(place, "evaluate", place / "out", "general benchmarks need lm-eval, found none", capsys, **options)


@pytest.mark.parametrize(("tampered", "status"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("output", ["closed", pytest.param("full", marks=pytest.mark.slow)])
def test_the_verdict_stands_whatever_happens_to_standard_output(output, tampered, status, place):
    """``verify DIR >&-`` and ``verify DIR > /dev/full``"""
    if output == "full" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    if tampered:
        tamper(place / "mine" / "adapter_model.safetensors")
    redirection = {"closed": ">&-", "full": "> /dev/full"}[output]
    command = f"{shlex.quote(sys.executable)} -m peft_perta verify {shlex.quote(str(place / 'mine'))} {redirection}"
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False, env=here)
    unwritten = output == "full"
    assert done.returncode == (status or (2 if unwritten else 0))
    assert ("standard output could not be written" in done.stderr) == unwritten
    assert "Traceback" not in done.stderr


def tamper(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("tampered", "status"), [(False, 0), (True, 1)])
def test_the_verdict_stands_although_nobody_reads_it(tampered, status, place, monkeypatch):
    """``peft-perta verify DIR | true``"""
    if tampered:
        tamper(place / "mine" / "adapter_model.safetensors")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["verify", str(place / "mine")]) == status
    monkeypatch.undo()
