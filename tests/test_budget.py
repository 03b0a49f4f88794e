"""A run stays within its memory budget, measured, and its adapter is the same."""

import dataclasses
import functools
import multiprocessing
import re
import threading
import types
from pathlib import Path

import builders
import laws
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_perta import ConfigError, PerTAConfig, get_perta_state_dict
from peft_perta.gradients import GradientSums, Plan
from peft_perta.gradients.modes import layerwise
from peft_perta.model import Target, memory, parse_size
from peft_perta.perta import GRANULARITIES, edit_layer, edited_layers, resolve_weighting

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
SUMS = 2 * 4 * 6 * (4 * 256**2 + 3 * 256 * 1024)  # bytes of both sets' sums: 48 MiB


def middling_llama():
    """Six layers with 48 MiB of sums for both sets; built in memory, so that no file is mapped."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=64,
        initializer_range=0.05,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return builders.with_adapters(LlamaForCausalLM(config))


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(3, 512, (48 - n % 8,), generator=generator) for n in range(16))
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


@dataclasses.dataclass
class Outcome:
    """The host memory that a run used, beyond what its process used before."""

    plan: Plan
    budget: float
    peak: int  # all of it
    own: int  # without mapped files, which the system reclaims when it needs to
    state_dict: dict


def negate(share, path, batch_size=8, chain=True, disk=True, **settings):
    """In a process of its own: a run with a budget of this share of both sets' sums. Saves its outcome, or the share
    that its refusal names."""
    if not chain:
        layerwise.why_no_chain = lambda *_: "on purpose"
    if not disk:
        memory.shutil = types.SimpleNamespace(disk_usage=lambda _: types.SimpleNamespace(free=0))
    plans = []
    choose = edited_layers.choose_plan
    edited_layers.choose_plan = lambda job: plans.append(choose(job)) or plans[0]
    model, forget, retain = middling_llama(), rows(1), rows(2)
    start, own = psutil.Process().memory_info().rss, own_memory()
    budget = None if share is None else start + int(share * SUMS)
    settings = {"granularity": "delta", "input_directions": False, **settings}
    config = PerTAConfig(batch_size=batch_size, host_memory=budget, **settings)
    try:
        with watch() as seen:
            _, state_dict, _ = get_perta_state_dict(model, config, forget, retain, show_progress_bar=False)
    except ConfigError as error:
        named = re.search(r"expected host_memory of at least ([\d.]+ \w+)", str(error)).group(1)
        torch.save((parse_size(named) - start) / SUMS, path)
    else:
        given = (budget or start) - start
        torch.save(Outcome(plans[0], given, status("VmHWM") - start, max(seen) - own, state_dict), path)


def status(key):
    return sum(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


def own_memory():
    return status("RssAnon") + status("RssShmem")


class watch:
    """A list of the process's own memory, sampled every millisecond within the context."""

    def __enter__(self):
        self.seen, self.over = [own_memory()], threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self.seen

    def look(self):
        while not self.over.wait(0.001):
            self.seen.append(own_memory())

    def __exit__(self, *exception):
        self.over.set()
        self.thread.join()


def edit(weighting, path):
    """In a process of its own: one layer's weights, edit and factors. Saves the memory used beside both sets' sums."""
    size, kind = 3072, types.SimpleNamespace(name="linear")
    target = Target("layer", None, None, kind, torch.randn(4, size), torch.randn(size, 4), 1.0)  # type: ignore[arg-type]
    sets = ("forget", "retain")
    sums = {name: GradientSums("mean", gradients={"weight": torch.randn(size, size)}, samples=1) for name in sets}
    start = psutil.Process().memory_info().rss
    edit_layer(target, PerTAConfig(granularity="delta", input_directions=False), resolve_weighting(weighting), sums, 4)
    torch.save((status("VmHWM") - start) / (4 * size**2), path)


def directed_edit(granularity, path):
    """The same with input directions; in copies of one set's sums."""
    size, kind = 2560, types.SimpleNamespace(name="linear")
    target = Target("layer", None, None, kind, torch.randn(4, size), torch.randn(size, 4), 1.0)  # type: ignore[arg-type]
    x = torch.randn(size // 4, size)
    gradients = {key: torch.randn(shape) for key, shape in GRANULARITIES[granularity].shapes(target).items()}
    moments = {"inputs": x.T @ x, "tokens": torch.full((1, 1), float(len(x)))}
    sums = {
        name: GradientSums("mean", "device", cloned(gradients), cloned(moments), samples=1)
        for name in ("forget", "retain")
    }
    size_of_sums = sum(total.nbytes for total in sums["forget"].tensors())
    del gradients, moments
    start = psutil.Process().memory_info().rss
    edit_layer(target, PerTAConfig(granularity=granularity), resolve_weighting("grad"), sums, 4)
    torch.save((status("VmHWM") - start) / size_of_sums, path)


def cloned(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def tidily(function, *args, **settings):
    """Run in a child, which would leave the scratch directory behind."""
    try:
        torch.set_num_threads(1)
        function(*args, **settings)
    finally:
        builders._scratch.cleanup()


@pytest.fixture(scope="module")
def in_child(tmp_path_factory):
    """Run a function of this file in a child of a process that has imported everything; returns what it saved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_perta.cli.unlearn"])
    directory = tmp_path_factory.mktemp("outcomes")

    def outcome(function, *args, **settings):
        path = directory / str(len(list(directory.iterdir())))
        child = context.Process(target=tidily, args=(function, *args, path), kwargs=settings)
        child.start()
        child.join(120)
        assert child.exitcode == 0, "see above"
        return torch.load(path, weights_only=False)

    return outcome


@pytest.fixture(scope="module")
def run(in_child):
    """``negate``, once per case."""
    return functools.cache(functools.partial(in_child, negate))


def assert_same_adapter(found: Outcome, run) -> None:
    """The same bits as a run with this micro-batch, and within 1e-6 of a run with any other."""
    free, alike = run(None), run(None, batch_size=found.plan.micro_batch)
    assert alike.plan.micro_batch == found.plan.micro_batch
    assert all(torch.equal(found.state_dict[key], tensor) for key, tensor in alike.state_dict.items())
    one, two = (torch.cat([d.flatten() for d in laws.deltas_of(o.state_dict).values()]) for o in (found, free))
    laws.close(one, two, 1e-6, "the adapter")


# name -> (budget as a share of both sets' sums, what is possible, what the plan must be)
CASES = {
    "a smaller batch": (3.0, {"chain": False, "disk": False}, lambda plan: len(plan.groups) == 1),
    "sweeps": (2.2, {"chain": False, "disk": False}, lambda plan: plan.mode == "grouped" and len(plan.groups) > 1),
    "sums on the disk": (2.2, {"chain": False}, lambda plan: plan.sums_place == "disk"),
    "layer by layer": (2.2, {"disk": False}, lambda plan: plan.mode == "layerwise"),
    "inputs on the disk": (1.6, {}, lambda plan: (plan.mode, plan.inputs_place) == ("layerwise", "disk")),
}


QUICK = {"sums on the disk", "layer by layer"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_run_stays_within_its_budget(name, run):
    share, possible, chosen = CASES[name]
    found = run(share, **possible)
    assert chosen(found.plan), str(found.plan)
    assert run(None).peak > found.budget, "the budget is less than an unlimited run uses"
    assert (found.own if found.plan.sums_place == "disk" else found.peak) <= found.budget, str(found.plan)
    assert_same_adapter(found, run)


def test_the_less_memory_the_more_sweeps(run):
    found = [run(share, chain=False, disk=False) for share in (3.0, 2.2, 1.8)]
    sweeps = [len(outcome.plan.groups) for outcome in found]
    assert sweeps == sorted(set(sweeps)), "more every time"
    for outcome in found:
        assert outcome.peak <= outcome.budget, str(outcome.plan)


def test_a_budget_that_is_too_small_is_refused_and_the_named_one_works(run):
    named = run(0.1)
    assert 0.1 < named < 1.8
    found = run(named)
    assert found.plan.mode == "layerwise"
    assert found.peak <= found.budget, str(found.plan)
    assert_same_adapter(found, run)


@pytest.mark.parametrize("weighting", ["grad", "fisher"])
def test_an_edit_takes_at_most_three_copies_of_its_layer(weighting, in_child):
    """The plan's figure, for a layer of 36 MiB: freed tensors of this size go back to the system at once."""
    assert in_child(edit, weighting) < 3


@pytest.mark.parametrize("granularity", ["factor", "delta"])
def test_an_edit_with_input_directions_takes_at_most_seven(granularity, in_child):
    assert in_child(directed_edit, granularity) < 7


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("layer by layer", "factor"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sweeps", "factor"), ("sweeps", "delta"), ("layer by layer", "delta"))
        ),
    ],
)
def test_a_run_with_input_directions_stays_within_its_budget(name, granularity, run):
    share, possible, chosen = CASES[name]
    # The moments are most of the sums with factors, and as large as the gradients' sums with delta.
    found = run(
        share * {"factor": 1.25, "delta": 2}[granularity], **possible, granularity=granularity, input_directions=True
    )
    assert chosen(found.plan), str(found.plan)
    assert found.peak <= found.budget, str(found.plan)


def test_a_refusal_comes_before_any_gradient(monkeypatch, capfd, tmp_path):
    """Nothing is printed, the model is unchanged, and there is no checkpoint. The remedy is one that works."""
    model = builders.adapted_llama()
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a gradient was taken"))
    with laws.untouched(model), pytest.raises(ConfigError, match=r"does not fit .*\(found 1 MiB\).*Raise the budget$"):
        get_perta_state_dict(
            model,
            PerTAConfig(host_memory="1MiB"),
            builders.forget_rows(),
            builders.retain_rows(),
            tokenizer=builders.tokenizer(),
            checkpoint_dir=tmp_path / "c",
        )
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "c").exists()
