"""An interrupted run resumes from its checkpoint, with the same bytes; another run is refused."""

import builtins
import collections
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import builders
import laws
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_perta import OutputError
from peft_perta.gradients import Checkpoint, Plan, engine, remove_checkpoint
from peft_perta.gradients import checkpoint as checkpoint_module
from peft_perta.gradients._taps import Taps
from peft_perta.gradients.modes import layerwise

RUN = {"format": 1, "model": "abc", "data": {"forget": "d", "retain": "e"}}
TENSORS = {
    ("odd.é|name", "A"): torch.tensor([[0.0, -0.0], [float("nan"), float("inf")]]),
    ("b",): torch.arange(3, dtype=torch.bfloat16) / 3,
    ("layer", "gradients", "wide"): torch.tensor([1 / 3], dtype=torch.float64),
    ("layer", "moments", "turned"): torch.arange(6.0).reshape(2, 3).T,
}
RECORD = {"layers": ["x.y", "é"], "samples": 5, "nested": [[0.1, None], {"a": True}]}


def bytes_of(tensors):
    return {key: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for key, t in tensors.items()}


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# The directory


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    Checkpoint(tmp_path / "deep" / "c", RUN).save("one", TENSORS, RECORD)
    tensors, record = Checkpoint(tmp_path / "deep" / "c", RUN).load("one")
    assert bytes_of(tensors) == bytes_of(TENSORS)
    assert record == RECORD


def test_entries_are_replaced_named_and_deleted(tmp_path):
    found = Checkpoint(tmp_path, RUN)
    assert (found.names(), found.load("a")) == ([], None)
    for name in ("b", "a", "b"):
        found.save(name, {}, {"last": name})
    assert found.names() == ["a", "b"]
    found.save("a", {("x",): torch.ones(1)}, {"last": "new"})
    assert found.load("a")[1] == {"last": "new"}
    found.delete("a")
    found.delete("a")
    assert Checkpoint(tmp_path, RUN).names() == ["b"]


def test_a_process_that_does_not_write_can_read(tmp_path):
    collector = Checkpoint(tmp_path / "c", RUN, writes=False)
    collector.save("a", TENSORS, RECORD)
    assert not (tmp_path / "c").exists()
    Checkpoint(tmp_path / "c", RUN).save("a", TENSORS, RECORD)
    (tmp_path / "c" / "b.safetensors.partial").write_text("theirs, who is writing")
    before = tree(tmp_path)
    collector = Checkpoint(tmp_path / "c", RUN, writes=False)
    collector.delete("a")
    assert collector.load("a")[1] == RECORD
    assert tree(tmp_path) == before


def half_a_file(error):
    def write(tensors, file, metadata):
        file.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_the_old_entry(error, tmp_path, monkeypatch):
    found = Checkpoint(tmp_path, RUN)
    found.save("a", TENSORS, RECORD)
    before = tree(tmp_path)
    monkeypatch.setattr(checkpoint_module, "save_file", half_a_file(error))
    for name in ("a", "new"):
        with pytest.raises(
            OutputError, match=rf"{name}\.safetensors could not be written: .*No space.*free some space"
        ):
            found.save(name, {}, {})
    assert tree(tmp_path) == before


@pytest.fixture
def small_files():
    """Files larger than 4 KiB cannot be written, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_the_system_cuts_short_leaves_the_old_entry(tmp_path, small_files):
    found = Checkpoint(tmp_path, RUN)
    found.save("a", TENSORS, RECORD)
    before = tree(tmp_path)
    small_files()
    with pytest.raises(OutputError, match=r"a\.safetensors could not be written"):
        found.save("a", {("large",): torch.ones(5000)}, RECORD)
    assert tree(tmp_path) == before


def killed_at(event_number, block) -> bool:
    """Run ``block`` in a child that kills itself (SIGKILL) at its n-th system call that changes a file; False if it
    finished."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(module, name):
            original = getattr(module, name)

            def counted(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(module, name, counted)

        for name in ("mkdir", "open", "fsync", "replace", "rename", "unlink"):
            count(os, name)
        count(builtins, "open")
        try:
            block()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", [True, False], ids=["new directory", "old directory"])
def test_a_kill_at_any_point_leaves_the_old_entry_or_the_new(first, tmp_path):
    """The same run can open the directory again, and deletes what was half written."""
    states = []
    for event_number in range(1, 100):
        path = tmp_path / str(event_number)
        if not first:
            Checkpoint(path, RUN).save("a", {}, {"is": "old"})
        alive = not killed_at(event_number, lambda: Checkpoint(path, RUN).save("a", TENSORS, {"is": "new"}))  # noqa: B023
        entry = Checkpoint(path, RUN).load("a")
        states.append(entry and entry[1]["is"])
        assert not list(path.glob("*.partial"))
        if alive:
            break
    assert alive, "more system calls than tried"
    assert len(states) > 3
    assert states.index("new") == states.count(None if first else "old"), "once it is written, it stays"
    assert states[-1] == "new"


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: file.write_bytes(b"\0" * 100),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"x": torch.ones(1)}, file),
        lambda file: save_file({"x": torch.ones(1)}, file, metadata={"record": "{"}),
    ],
    ids=["cut", "zeros", "empty", "no record", "half a record"],
)
def test_a_damaged_entry_is_refused(damage, tmp_path):
    found = Checkpoint(tmp_path, RUN)
    found.save("a", TENSORS, RECORD)
    damage(tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match=r"a\.safetensors is damaged \(.*\); delete .* to start again"):
        found.load("a")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "x"}, "model"),
        ({"data": {"forget": "d"}, "model": "x"}, "data, model"),
        ({"more": 1}, "more"),
        ({"format": None}, "format"),
    ],
)
def test_another_run_is_refused_with_what_differs(changes, named, tmp_path):
    Checkpoint(tmp_path, RUN).save("a", TENSORS, RECORD)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=f"is the checkpoint of another run, which differs in: {named}; repeat the"):
        Checkpoint(tmp_path, {**RUN, **changes})
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "files",
    [{"thesis.tex": "years"}, {"run.json": "{"}, {"run.json": "[1]"}, {"run.json.partial": "{", "thesis.tex": "years"}],
    ids=["another's", "no JSON", "no object", "half ours"],
)
def test_another_directory_is_left_alone(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"is not a checkpoint of this package \(it has no readable run\.json\)"):
        Checkpoint(tmp_path, RUN)
    remove_checkpoint(tmp_path / "none")
    if "run.json" not in files:
        remove_checkpoint(tmp_path)
    assert tree(tmp_path) == before


def test_a_file_is_refused(tmp_path):
    (tmp_path / "c").write_text("x")
    with pytest.raises(OutputError, match="is not a checkpoint of this package"):
        Checkpoint(tmp_path / "c", RUN)
    with pytest.raises(OutputError, match=r"run\.json could not be written"):
        Checkpoint(tmp_path / "c" / "inner", RUN).start()
    assert (tmp_path / "c").read_text() == "x"


def test_a_checkpoint_is_removed_whole_once_it_is_not_needed(tmp_path):
    Checkpoint(tmp_path / "c", RUN).save("a", TENSORS, RECORD)
    remove_checkpoint(tmp_path / "c")
    assert not (tmp_path / "c").exists()


# Resuming

SETTINGS = {"granularity": "delta", "rank": 3, "batch_size": 2}
FORGET, RETAIN = 3, 2  # batches: 5 and 4 rows, 2 at a time


@pytest.fixture
def two_groups(monkeypatch):
    """Two sweeps of one decoder block each."""
    plan_as(monkeypatch, "grouped")


def plan_as(monkeypatch, mode):
    def make_plan(measured, taken, budget, batch_size, modes):
        names = [layer.name for layer in reversed(measured.layers)]
        return Plan(mode, (tuple(names[:7]), tuple(names[7:])), "device", "device", batch_size)

    monkeypatch.setattr(engine, "make_plan", make_plan)
    monkeypatch.setattr(layerwise, "why_no_chain", lambda *_: None)  # it would take gradients, too


class Interruption:
    """Counts backward calls, and the gradients of each layer; raises at the n-th backward call."""

    def __init__(self, monkeypatch):
        self.start()
        backward, add = torch.Tensor.backward, Taps._add

        def counted(tensor, *args, **kwargs):
            if self.backwards == self.at:
                raise self.error
            self.backwards += 1
            return backward(tensor, *args, **kwargs)

        def added(taps, target, *args):
            self.layers[target.name] += 1
            return add(taps, target, *args)

        monkeypatch.setattr(torch.Tensor, "backward", counted)
        monkeypatch.setattr(Taps, "_add", added)

    def start(self, at=None, error=None):
        self.at, self.error = at, error
        self.backwards, self.layers = 0, collections.Counter()


@pytest.fixture
def count(monkeypatch):
    return Interruption(monkeypatch)


def negate(path, model=None, **changes):
    return builders.negate(model or builders.adapted_llama(), checkpoint_dir=path, **{**SETTINGS, **changes})


def assert_same(one, two):
    assert one[0].to_dict() == two[0].to_dict()
    assert bytes_of(one[1]) == bytes_of(two[1])
    assert one[2].to_dict() == two[2].to_dict()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_sweeps_resume_where_they_were_interrupted(kind, two_groups, count, tmp_path):
    """Interrupted at every single backward call; finished sweeps are not repeated."""
    once = FORGET + RETAIN
    expected = negate(tmp_path / "whole")
    assert count.backwards == 2 * once
    for at in range(2 * once):
        count.start(at, kind("on purpose"))
        model = builders.adapted_llama()
        with laws.untouched(model), pytest.raises(kind, match="on purpose"):
            negate(tmp_path / str(at), model)
        count.start()
        assert_same(negate(tmp_path / str(at)), expected)
        done = at // once * once + (FORGET if at % once >= FORGET else 0)
        assert count.backwards == 2 * once - done
        upper = [n for name, n in count.layers.items() if name.startswith("model.layers.1.")]
        assert sum(upper) == 7 * max(0, once - done)


def test_layer_by_layer_resumes_where_it_was_interrupted(monkeypatch, count, tmp_path):
    """The forward pass is repeated, and finished blocks only propagate the gradient."""
    plan_as(monkeypatch, "layerwise")
    once = FORGET + RETAIN
    expected = negate(tmp_path / "whole")
    assert count.backwards == 3 * once, "the head, and two blocks"
    for at in range(0, 3 * once, 2):
        count.start(at, KeyboardInterrupt("on purpose"))
        model = builders.adapted_llama()
        with laws.untouched(model), pytest.raises(KeyboardInterrupt, match="on purpose"):
            negate(tmp_path / str(at), model)
        count.start()
        assert_same(negate(tmp_path / str(at)), expected)
        assert sum(n for name, n in count.layers.items() if ".1." in name) == (7 * once if at < 2 * once else 0)
        assert sum(n for name, n in count.layers.items() if ".0." in name) == 7 * once


@pytest.mark.parametrize("mode", ["grouped", "layerwise"])
def test_a_finished_run_is_not_run_again(mode, monkeypatch, count, tmp_path):
    plan_as(monkeypatch, mode)
    expected = negate(tmp_path)
    before = tree(tmp_path)
    count.start()
    monkeypatch.setattr(engine, "measure", lambda *_: pytest.fail("it was planned again"))
    assert_same(negate(tmp_path), expected)
    assert count.backwards == 0
    assert tree(tmp_path) == before


def test_sums_are_deleted_when_their_group_is_finished(two_groups, tmp_path):
    negate(tmp_path)
    assert sorted(tree(tmp_path)) == [
        "layers-000007.safetensors",
        "layers-000014.safetensors",
        "lock",
        "plan.safetensors",
        "run.json",
    ]


@pytest.mark.parametrize("after", range(5))
def test_a_full_disk_stops_the_run_and_it_resumes_with_free_space(after, two_groups, monkeypatch, tmp_path):
    """Full at the plan, at one group's sums, or at one group's layers."""
    expected = negate(tmp_path / "whole")
    written = []

    def full(tensors, file, metadata):
        if len(written) == after:
            half_a_file(OSError(errno.ENOSPC, "No space left on device"))(tensors, file, metadata)
        written.append(file)
        save_file(tensors, file, metadata=metadata)

    model = builders.adapted_llama()
    with monkeypatch.context() as patched, laws.untouched(model):
        patched.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(OutputError, match="No space left on device; free some space and run this again"):
            negate(tmp_path / "c", model)
    assert not list(tmp_path.rglob("*.partial"))
    assert_same(negate(tmp_path / "c"), expected)


def test_the_plan_is_kept_unless_the_budget_changes(monkeypatch, count, tmp_path):
    """Interrupted in sweeps; with another budget the rest runs layer by layer, with the same bytes."""
    plan_as(monkeypatch, "grouped")
    expected = negate(tmp_path / "whole")
    for changes, mode in (({}, "grouped"), ({"host_memory": "100GiB"}, "layerwise")):
        plan_as(monkeypatch, "grouped")
        count.start(FORGET + RETAIN + 1, KeyboardInterrupt("on purpose"))
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            negate(tmp_path / mode)
        plan_as(monkeypatch, "layerwise")
        count.start()
        config, state_dict, provenance = negate(tmp_path / mode, **changes)
        assert provenance.config == {**expected[2].config, **changes}
        assert_same((config, state_dict, dataclasses.replace(provenance, config=expected[2].config)), expected)
        kept = Checkpoint(tmp_path / mode, json.loads((tmp_path / mode / "run.json").read_text())).load("plan")
        assert kept[1]["plan"]["mode"] == mode
        assert not [name for name in count.layers if ".1." in name], "the upper block is done"


def changed_weight():
    model = builders.adapted_llama()
    builders.flip_a_bit(model.get_base_model().model.norm.weight)
    return model


def changed_config():
    model = builders.adapted_llama()
    model.get_base_model().config.rms_norm_eps = 1e-3
    return model


def changed_adapter():
    model = builders.adapted_llama()
    builders.flip_a_bit(next(p for name, p in model.named_parameters() if "lora_B.forget" in name))
    return model


def changed_task():
    model = builders.adapted_llama()
    builders.flip_a_bit(next(p for name, p in model.named_parameters() if "lora_B.task" in name))
    return model


FULL = {"gradients_at": "full", "task_adapter": "task"}


@pytest.mark.parametrize(
    ("changes", "model", "named"),
    [
        ({"forget": [*builders.forget_rows(), {"text": "more"}]}, None, "data"),
        ({"retain": builders.retain_rows()[:-1]}, None, "data"),
        ({"rank": 4}, None, "config"),
        ({"weighting": "fisher"}, None, "config"),
        ({}, changed_weight, "the model's weights"),
        ({}, changed_config, "the model's architecture"),
        ({}, changed_adapter, "forget adapter"),
        ({}, changed_task, "adapters that are on"),
        ({"task_adapter": None}, None, "adapters that are on"),
    ],
    ids=[
        "forget rows",
        "retain rows",
        "rank",
        "weighting",
        "a weight",
        "architecture",
        "forget adapter",
        "task adapter",
        "no task",
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_any_gradient(changes, model, named, count, tmp_path):
    negate(tmp_path, **FULL)
    before = tree(tmp_path)
    count.start()
    with pytest.raises(
        OutputError, match=f"which differs in: {named}; repeat the original command to resume that run, or delete"
    ):
        negate(tmp_path, model and model(), **{**FULL, **changes})
    assert count.backwards == 0
    assert tree(tmp_path) == before


def test_task_arithmetic_needs_no_checkpoint(tmp_path):
    negate(tmp_path / "c", weighting="uniform")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("altered", ["tensors", "record"])
def test_an_altered_entry_is_refused(altered, tmp_path):
    Checkpoint(tmp_path / "c", RUN).save("a", TENSORS, RECORD)
    file = tmp_path / "c" / "a.safetensors"
    with safe_open(file, framework="pt") as stored:
        tensors, metadata = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()  # noqa: SIM118
    if altered == "tensors":
        tensors = {key: 100 * tensor for key, tensor in tensors.items()}
    else:
        metadata["record"] = json.dumps({**RECORD, "another": 1})
    save_file(tensors, file, metadata)
    with pytest.raises(OutputError, match=r"a\.safetensors is damaged \(it is not what was written\)"):
        Checkpoint(tmp_path / "c", RUN).load("a")


HOLDER = """
import sys, time
from peft_perta.gradients import Checkpoint
checkpoint = Checkpoint(sys.argv[1], {"format": 1, "of": "another process"})
checkpoint.save("a", {}, {})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A checkpoint that a living process computes; yields its path and the process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "c")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "c", process
    process.kill()
    process.wait()


def test_the_checkpoint_of_a_living_process_is_refused_and_that_of_a_dead_one_is_not(held):
    path, process = held
    for run in (RUN, {"format": 1, "of": "another process"}):
        with pytest.raises(OutputError, match=f"c is in use by process {process.pid}, which computes"):
            Checkpoint(path, run)
    process.kill()
    process.wait()
    assert Checkpoint(path, {"format": 1, "of": "another process"}).names() == ["a"]


def test_of_two_runs_that_begin_together_the_second_is_refused(tmp_path, held):
    """It was made before the first one wrote anything, so that only its start can find out."""
    path, process = held
    late = Checkpoint(tmp_path / "other", RUN)
    late.path = path
    with pytest.raises(OutputError, match=f"in use by process {process.pid}"):
        late.save("b", {}, {})
    assert not (path / "b.safetensors").exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("years of work")
    Checkpoint(tmp_path / "c", RUN).save("a", {}, {})
    (tmp_path / "c" / "lock").unlink()
    (tmp_path / "c" / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="lock could not be written"):
        Checkpoint(tmp_path / "c", RUN)
    assert (tmp_path / "victim").read_text() == "years of work"


def test_the_same_process_may_begin_again(tmp_path):
    first = Checkpoint(tmp_path / "c", RUN)
    first.save("a", {}, RECORD)
    again = Checkpoint(tmp_path / "c", RUN)
    again.save("b", {}, RECORD)
    assert again.names() == ["a", "b"]
