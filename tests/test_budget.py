"""The promise, measured: a run stays within the memory that it is given, and its adapter is the same."""

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
from peft_perta.gradients import MOMENT, GradientSums, Plan, engine
from peft_perta.model import Target, memory, parse_size
from peft_perta.perta import GRANULARITIES, edit_layer, resolve_weighting
from peft_perta.perta import run as perta

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
STATISTICS = 2 * 4 * 6 * (4 * 256**2 + 3 * 256 * 1024)  # bytes of both sets' sums: 48 MiB


def middling_llama():
    """Six layers whose sums of both sets are 48 MiB; built here, so that nothing is mapped from a file."""
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
    """What a run took of the host's memory, beyond what its process had before."""

    plan: Plan
    budget: float
    peak: int  # everything
    own: int  # but for what files are mapped to it, which the system takes back when it needs it
    state_dict: dict


def negate(share, path, batch_size=8, chain=True, disk=True, **settings):
    """In a process of its own: a run that may take so much, in shares of both sets' sums. Its outcome goes to a file,
    or the share that its refusal names."""
    if not chain:
        engine.why_no_chain = lambda *_: "on purpose"
    if not disk:
        memory.shutil = types.SimpleNamespace(disk_usage=lambda _: types.SimpleNamespace(free=0))
    plans = []
    choose = perta.choose_plan
    perta.choose_plan = lambda *args: plans.append(choose(*args)) or plans[0]
    model, forget, retain = middling_llama(), rows(1), rows(2)
    start, own = psutil.Process().memory_info().rss, own_memory()
    budget = None if share is None else start + int(share * STATISTICS)
    settings = {"granularity": "delta", "input_directions": False, **settings}
    config = PerTAConfig(batch_size=batch_size, host_memory=budget, **settings)
    try:
        with watch() as seen:
            _, state_dict, _ = get_perta_state_dict(model, config, forget, retain, show_progress_bar=False)
    except ConfigError as error:
        named = re.search(r"expected host_memory of at least ([\d.]+ \w+)", str(error)).group(1)
        torch.save((parse_size(named) - start) / STATISTICS, path)
    else:
        given = (budget or start) - start
        torch.save(Outcome(plans[0], given, status("VmHWM") - start, max(seen) - own, state_dict), path)


def status(key):
    return sum(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


def own_memory():
    return status("RssAnon") + status("RssShmem")


class watch:
    """A list of what the process holds by itself, every millisecond of the block."""

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
    """In a process of its own: one layer's weights, edit and factors; what that took beside both sets' sums."""
    size, kind = 3072, types.SimpleNamespace(name="linear")
    target = Target("layer", None, None, kind, torch.randn(4, size), torch.randn(size, 4), 1.0)  # type: ignore[arg-type]
    sets = ("forget", "retain")
    pair = {name: GradientSums("mean", sums={"weight": torch.randn(size, size)}, samples=1) for name in sets}
    start = psutil.Process().memory_info().rss
    edit_layer(target, PerTAConfig(granularity="delta", input_directions=False), resolve_weighting(weighting), pair, 4)
    torch.save((status("VmHWM") - start) / (4 * size**2), path)


def directed_edit(granularity, path):
    """The same with input directions; in copies of all of one set's sums."""
    size, kind = 2560, types.SimpleNamespace(name="linear")
    target = Target("layer", None, None, kind, torch.randn(4, size), torch.randn(size, 4), 1.0)  # type: ignore[arg-type]
    x = torch.randn(size // 4, size)
    sums = {key: torch.randn(shape) for key, shape in GRANULARITIES[granularity].shapes(target).items()}
    sums |= {f"{MOMENT}inputs": x.T @ x, f"{MOMENT}tokens": torch.full((1, 1), float(len(x)))}
    own = {name: {key: total.clone() for key, total in sums.items()} for name in ("forget", "retain")}
    pair = {name: GradientSums("mean", sums=found, samples=1) for name, found in own.items()}
    held = sum(total.nbytes for total in sums.values())
    del sums, own
    start = psutil.Process().memory_info().rss
    edit_layer(target, PerTAConfig(granularity=granularity), resolve_weighting("grad"), pair, 4)
    torch.save((status("VmHWM") - start) / held, path)


def tidily(function, *args, **settings):
    """A child leaves without the clean-up that a process makes."""
    try:
        torch.set_num_threads(1)
        function(*args, **settings)
    finally:
        builders._scratch.cleanup()


@pytest.fixture(scope="module")
def in_child(tmp_path_factory):
    """Run a function here in a child of a process that has the imports behind it; what it saved."""
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
    """``negate``, once for each case."""
    return functools.cache(functools.partial(in_child, negate))


def assert_same_adapter(found: Outcome, run) -> None:
    """Bit for bit that of a run of the same micro-batch, and within 1e-6 that of any."""
    free, alike = run(None), run(None, batch_size=found.plan.micro_batch)
    assert alike.plan.micro_batch == found.plan.micro_batch
    assert all(torch.equal(found.state_dict[key], tensor) for key, tensor in alike.state_dict.items())
    one, two = (torch.cat([d.flatten() for d in laws.deltas_of(o.state_dict).values()]) for o in (found, free))
    laws.close(one, two, 1e-6, "the adapter")


# share of both sets' sums, what is possible -> what is chosen
CASES = {
    "a smaller batch": (3.0, {"chain": False, "disk": False}, lambda plan: len(plan.groups) == 1),
    "sweeps": (2.2, {"chain": False, "disk": False}, lambda plan: plan.mode == "grouped" and len(plan.groups) > 1),
    "sums on the disk": (2.2, {"chain": False}, lambda plan: plan.statistics == "disk"),
    "layer by layer": (2.2, {"disk": False}, lambda plan: plan.mode == "layerwise"),
    "inputs on the disk": (1.6, {}, lambda plan: (plan.mode, plan.inputs) == ("layerwise", "disk")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_stays_within_the_memory_that_it_is_given(name, run):
    share, possible, chosen = CASES[name]
    found = run(share, **possible)
    assert chosen(found.plan), str(found.plan)
    assert run(None).peak > found.budget, "it is given less than it would take"
    assert (found.own if found.plan.statistics == "disk" else found.peak) <= found.budget, str(found.plan)
    assert_same_adapter(found, run)


def test_the_less_memory_the_more_sweeps(run):
    found = [run(share, chain=False, disk=False) for share in (3.0, 2.2, 1.8)]
    sweeps = [len(outcome.plan.groups) for outcome in found]
    assert sweeps == sorted(set(sweeps)), "ever more"
    for outcome in found:
        assert outcome.peak <= outcome.budget, str(outcome.plan)


def test_what_cannot_work_is_refused_and_what_the_refusal_names_works(run):
    named = run(0.1)
    assert 0.1 < named < 1.8
    found = run(named)
    assert found.plan.mode == "layerwise"
    assert found.peak <= found.budget, str(found.plan)
    assert_same_adapter(found, run)


@pytest.mark.parametrize("weighting", ["grad", "fisher"])
def test_an_edit_takes_at_most_three_copies_of_its_layer(weighting, in_child):
    """The plan's figure, of a layer of 36 MiB: so large a tensor goes back to the system as soon as it is freed."""
    assert in_child(edit, weighting) < 3


@pytest.mark.parametrize("granularity", ["factor", "delta"])
def test_an_edit_with_input_directions_takes_at_most_seven(granularity, in_child):
    assert in_child(directed_edit, granularity) < 7


@pytest.mark.parametrize("name", ["sweeps", "layer by layer"])
@pytest.mark.parametrize("granularity", ["factor", "delta"])
def test_with_input_directions_too(name, granularity, run):
    share, possible, chosen = CASES[name]
    # The moments are most of what the factors' sums take, and as much again beside the delta's.
    found = run(
        share * {"factor": 1.25, "delta": 2}[granularity], **possible, granularity=granularity, input_directions=True
    )
    assert chosen(found.plan), str(found.plan)
    assert found.peak <= found.budget, str(found.plan)


def test_a_refusal_comes_before_any_gradient(monkeypatch, capfd, tmp_path):
    """Nothing is shown, nothing is changed, nothing is begun."""
    model = builders.adapted_llama()
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a gradient was taken"))
    with laws.untouched(model), pytest.raises(ConfigError, match=r"does not fit its memory budget.*\(found 1 MiB\)"):
        get_perta_state_dict(
            model,
            PerTAConfig(host_memory="1MiB"),
            builders.forget_rows(),
            builders.retain_rows(),
            tokenizer=builders.tokenizer(),
            checkpoint_dir=tmp_path / "c",
        )
    assert capfd.readouterr().err == ""
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["run.json"]
