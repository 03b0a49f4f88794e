"""kill -9 at random moments, then the same command again: the same bytes as an uninterrupted run."""

import json
import random
import signal
import time
from pathlib import Path

import builders
import pytest
import torch
from children import Child

from peft_perta import load_base
from peft_perta.gradients.checkpoint import RUN_NAME

# Slows down every batch, so that the kill happens during one, and forces a plan of several groups or of blocks.
SLOWLY = """
import dataclasses, sys, time
from peft_perta.gradients import blocks, engine, passes
from peft_perta.model import losses
from peft_perta.cli import main

mode, pause = sys.argv[1], float(sys.argv[2])
plain, plan_of = losses.sample_losses, engine._new_plan

def slowly(*arguments):
    time.sleep(pause)
    return plain(*arguments)

def forced(job):
    plan = plan_of(job)
    names = [name for group in plan.groups for name in group]
    groups = tuple(tuple(names[i : i + 5]) for i in range(0, len(names), 5))
    return dataclasses.replace(plan, mode=mode, groups=groups, micro_batch=2)

def slowly_back(*arguments, **named):
    time.sleep(pause)
    return back(*arguments, **named)

passes.sample_losses = slowly
back, blocks.Chain.back = blocks.Chain.back, slowly_back
engine._new_plan = forced
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kill")
    adapted = builders.with_adapters(load_base(str(builders.llama_directory()), dtype=torch.float32)[0])
    adapted.save_pretrained(directory, selected_adapters=["forget"])
    for name, rows in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "slowly.py").write_text(SLOWLY)
    return directory


def start(place: Path, mode: str, output: str, pause: float) -> Child:
    arguments = [
        *("slowly.py", mode, str(pause), "unlearn", "--model", str(builders.llama_directory())),
        *("--forget-adapter", "forget", "--forget", "forget.jsonl", "--retain", "retain.jsonl"),
        *("--granularity", "delta", "--output", output),
    ]
    return Child(arguments, place)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def wait_for(condition, process: Child) -> None:
    while not condition():
        assert process.is_running, process.output
        time.sleep(0.005)


@pytest.mark.parametrize("mode", ["grouped", "layerwise"])
def test_killed_and_run_again(mode, place):
    start(place, mode, f"{mode}-whole", 0).finished()
    whole = contents(place / f"{mode}-whole")
    output, checkpoint = f"{mode}-cut", place / f"{mode}-cut.checkpoint"
    moments = random.Random(0)
    # After the start of the run, somewhere in its gradients, and after a group or a block is done.
    for entry, latest in ((RUN_NAME, 0.5), ("plan.safetensors", 1.5), ("layers-*", 0.5)):
        process = start(place, mode, output, 0.3)
        wait_for(lambda entry=entry: list(checkpoint.glob(entry)), process)
        time.sleep(moments.uniform(0, latest))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (place / output).exists(), "the run finished before it was killed"
    assert list(checkpoint.glob("layers-*")), "the killed runs left no results"
    said = start(place, mode, output, 0).finished()
    assert "layers are done already, by an earlier run" in said
    assert contents(place / output) == whole
    assert not checkpoint.exists()


def test_an_interrupt_says_how_to_go_on(place):
    process = start(place, "grouped", "interrupted", 0.3)
    checkpoint = place / "interrupted.checkpoint"
    wait_for(lambda: len(list(checkpoint.glob("*.safetensors"))) > 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.output
    said = process.output
    assert "interrupted; run the same command again to resume" in said
    assert not (place / "interrupted").exists()
    start(place, "grouped", "interrupted", 0).finished()
    assert not checkpoint.exists()
