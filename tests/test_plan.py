"""The plan holds every layer once, fits the budget, and is the cheapest one; a refusal names a budget that fits."""

import copy
import dataclasses
import itertools
import json
import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_perta import ConfigError
from peft_perta.gradients import Plan
from peft_perta.gradients._planning import make_plan
from peft_perta.gradients.plan import LayerCost, Measured
from peft_perta.model import parse_size

MIB = 2**20
AMPLE = 2**50
OVERHEAD = 64  # tokens that a batch costs before its first
PER_BYTE = {  # operations charged for moving a byte there and back
    "gpu": {"device": 0, "host": 5_000, "disk": 50_000},
    "cpu": {"device": 0, "disk": 100},
}


def measured(blocks=(0, 0, 1, 1), pools=("cpu",), sum_bytes=8 * MIB, **changes) -> Measured:
    """Layers of 2**20 weights each, in these blocks, spread over the pools; nothing else runs."""
    count = len(blocks)
    layers = tuple(
        LayerCost(f"layer{i}", pools[i * len(pools) // count], sum_bytes, 2**20, (count - i) * 2**20, block)
        for i, block in enumerate(blocks)
    )
    settings = {
        "layers": layers,
        "size": count * 2**20,
        "activations": dict.fromkeys(pools, 10 * MIB),
        "block_activations": dict.fromkeys(pools, 6 * MIB),
        "block_input": MIB,
        "blocks": 2,
        "samples": 16,
        "tokens": 16 * 640,
        "formed": 0,
    }
    return Measured(**{**settings, **changes})


def plan_within(host, batch_size=4, found=None, disk=0, **changes) -> Plan:
    """On a CPU, with 100 MiB in use already."""
    return make_plan(found or measured(**changes), {"cpu": 100 * MIB}, {"cpu": host, "disk": disk}, batch_size)


# The slow, obvious version: every cut into contiguous groups, in every place, at every batch size.


def every_plan(m: Measured, taken: dict, batch_size: int):
    """(peak, cost, mode) of every plan."""
    kind = "cpu" if set(m.activations) == {"cpu"} else "gpu"
    micro_batch = 1 if m.one_at_a_time else min(batch_size, m.samples)
    while True:
        overhead = 1 + OVERHEAD / (micro_batch * m.tokens / m.samples)
        for place, per_byte in PER_BYTE[kind].items():
            for cuts in itertools.product([False, True], repeat=len(m.layers) - 1):
                groups = [[m.layers[-1]]]
                for cut, layer in zip(reversed(cuts), m.layers[-2::-1], strict=True):
                    groups = [*groups, [layer]] if cut else [*groups[:-1], [*groups[-1], layer]]
                cost = sum(1 + (2 if m.recomputes else 1) * max(x.after for x in g) / m.size for g in groups)
                cost += m.formed / m.size
                moved = sum(x.sum_bytes for x in m.layers) * m.samples / micro_batch
                cost += moved * per_byte / (2 * m.size * m.tokens)
                peak = largest(held(m, g, m.activations, micro_batch, place, taken) for g in groups)
                yield peak, cost * overhead, "grouped"
            if is_chain(m):
                names = sorted({(m.blocks if x.block is None else x.block) for x in m.layers}, reverse=True)
                groups = [[x for x in m.layers if (m.blocks if x.block is None else x.block) == n] for n in names]
                peak = largest(held(m, g, m.block_activations, micro_batch, "device", taken) for g in groups)
                lowest = min(x.block for x in m.layers if x.block is not None)
                inputs = (m.blocks - lowest + 1) * m.block_input + m.arguments
                if place == "host":  # pinned, in powers of two
                    of_batch = max(1, m.block_input * micro_batch / m.samples)
                    inputs = int(inputs * next(2**n for n in range(60) if 2**n >= of_batch) / of_batch)
                pool = {"device": next(iter(m.activations)), "host": "cpu", "disk": "disk"}[place]
                peak[pool] = peak.get(pool, taken.get(pool, 0)) + inputs
                cost = 1 + 2 * max(x.after for x in m.layers) / m.size
                cost += m.formed / m.size
                cost += 4 * inputs * per_byte / (2 * m.size * m.tokens)
                yield peak, cost * overhead, "layerwise"
        if micro_batch == 1:
            return
        micro_batch = math.ceil(micro_batch / 2)


def held(m, group, activations, micro_batch, place, taken) -> dict:
    """Both sets' sums, and a batch or three copies of the largest layer, whichever is more."""
    peak = {}
    for pool, per_sample in activations.items():
        here = [layer.sum_bytes for layer in group if layer.pool == pool]
        beside = max(m.fixed.get(pool, 0) + micro_batch * per_sample, 3 * max(here, default=0))
        peak[pool] = taken.get(pool, 0) + beside + (2 * sum(here) if place == "device" else 0)
    if place != "device":
        pool = "cpu" if place == "host" else "disk"
        peak[pool] = peak.get(pool, taken.get(pool, 0)) + 2 * sum(layer.sum_bytes for layer in group)
    return peak


def largest(peaks) -> dict:
    found = list(peaks)
    return {pool: max(peak.get(pool, 0) for peak in found) for pool in found[0]}


def is_chain(m: Measured) -> bool:
    """No target before or between the blocks."""
    inside = [layer.block is not None for layer in m.layers]
    return m.blocks > 0 and any(inside) and inside == sorted(inside, reverse=True)


def fits(peak: dict, budget: dict) -> bool:
    return all(size <= budget[pool] for pool, size in peak.items())


MACHINES = (("cpu",), ("cuda:0",), ("cuda:0", "cuda:1"), ("cuda:0", "cpu"))  # the pools that a model's layers are in


@st.composite
def cases(draw, machines=MACHINES):
    """(measured, taken, budget, batch_size), with budgets close to those at which the choice of plan changes."""
    pools = draw(st.sampled_from(machines))
    count = draw(st.integers(1, 5))
    inside = draw(st.integers(0, count))
    blocks = [*sorted(draw(st.lists(st.integers(0, 2), min_size=inside, max_size=inside))), *[None] * (count - inside)]
    if draw(st.integers(0, 3)) == 0:
        blocks[draw(st.integers(0, count - 1))] = None
    sizes = draw(st.lists(st.integers(1, 2**20), min_size=count, max_size=count))
    beside = draw(st.lists(st.integers(0, 2**20), min_size=count + 1, max_size=count + 1))
    sum_bytes = draw(st.lists(st.integers(1, 64 * MIB), min_size=count, max_size=count))
    ran = list(itertools.accumulate([beside[0], *(size + more for size, more in zip(sizes, beside[1:], strict=True))]))
    m = Measured(
        layers=tuple(
            LayerCost(f"layer{i}", draw(st.sampled_from(pools)), sum_bytes[i], sizes[i], ran[-1] - ran[i], blocks[i])
            for i in range(count)
        ),
        size=ran[-1],
        activations={pool: draw(st.integers(0, 64 * MIB)) for pool in pools},
        block_activations={pool: draw(st.integers(0, 16 * MIB)) for pool in pools},
        block_input=draw(st.integers(1, 16 * MIB)),
        blocks=draw(st.sampled_from([0, 3, 3, 3])),
        samples=draw(st.integers(1, 20)),
        tokens=draw(st.integers(20, 20_000)),
        formed=draw(st.integers(0, 10**6)),
        one_at_a_time=draw(st.integers(0, 4)) == 0,
        recomputes=draw(st.booleans()),
        arguments=draw(st.integers(0, 8 * MIB)),
        fixed={pool: draw(st.integers(0, 8 * MIB)) for pool in pools},
    )
    taken = {pool: draw(st.integers(0, 64 * MIB)) for pool in {*pools, "cpu"}}
    batch_size = draw(st.integers(1, 9))
    mode = draw(st.sampled_from(["grouped", "layerwise"]))
    plans = list(every_plan(m, taken, batch_size))
    peak, *_ = draw(st.sampled_from([plan for plan in plans if plan[2] == mode] or plans))
    budget = {pool: draw(st.sampled_from([0, 64 * MIB, AMPLE])) for pool in (*pools, "cpu", "disk")}
    budget |= {pool: max(0, size + draw(st.sampled_from([0, 0, 0, -1, 16 * MIB]))) for pool, size in peak.items()}
    return m, taken, budget, batch_size


def planned(case) -> Plan:
    try:
        return make_plan(*case)
    except ConfigError:
        assume(False)
        raise


@given(case=cases())
def test_every_layer_is_in_one_group_and_the_groups_go_from_the_top_down(case):
    m, *_ = case
    plan = planned(case)
    assert [name for group in plan.groups for name in group] == [layer.name for layer in reversed(m.layers)]
    assert all(plan.groups), "no sweep is empty"


@given(case=cases())
def test_there_is_a_plan_where_one_fits_and_it_is_the_cheapest(case):
    m, taken, budget, batch_size = case
    fitting = [cost for peak, cost, _ in every_plan(m, taken, batch_size) if fits(peak, budget)]
    if not fitting:
        with pytest.raises(ConfigError, match="does not fit its memory budget, whatever the plan"):
            make_plan(*case)
        return
    assert make_plan(*case).cost == pytest.approx(min(fitting))


@given(case=cases())
def test_the_predicted_peak_is_the_plans_own_and_within_the_budget(case):
    m, taken, budget, batch_size = case
    plan = planned(case)
    assert fits(plan.peak, budget)
    assert plan.budget == budget
    by_name = {layer.name: layer for layer in m.layers}
    place = plan.sums_place if plan.mode == "grouped" else "device"
    activations = m.activations if plan.mode == "grouped" else m.block_activations
    groups = [[by_name[name] for name in group] for group in plan.groups]
    expected = largest(held(m, group, activations, plan.micro_batch, place, taken) for group in groups)
    if plan.mode == "grouped":
        assert plan.peak == expected
    else:
        assert all(plan.peak[pool] >= size for pool, size in expected.items())
    assert 1 <= plan.micro_batch <= min(batch_size, m.samples)


@given(case=cases(), more=st.integers(1, 256 * MIB), data=st.data())
def test_more_memory_never_costs_more(case, more, data):
    m, taken, budget, batch_size = case
    pool = data.draw(st.sampled_from(sorted(budget)))
    cost = planned(case).cost
    assert make_plan(m, taken, {**budget, pool: budget[pool] + more}, batch_size).cost <= cost


@given(case=cases())
def test_a_plan_depends_on_nothing_else_and_changes_nothing(case):
    before = copy.deepcopy(case)
    one, two = planned(case), planned(copy.deepcopy(case))
    assert one == two
    assert case == before


@st.composite
def refusals(draw, machines=MACHINES):
    """Cases whose first pool has less memory than any plan needs."""
    m, taken, budget, batch_size = draw(cases(machines))
    first = next(iter(m.activations))
    least = min(peak[first] for peak, *_ in every_plan(m, taken, batch_size))
    assume(least > 0)
    return m, taken, {**budget, first: draw(st.integers(0, least - 1))}, batch_size


@given(case=refusals())
def test_a_refusal_names_budgets_that_fit(case):
    m, taken, budget, batch_size = case
    named = refused(case)
    budget = {pool: max(size, named.get(setting_of(pool), 0)) for pool, size in budget.items()}
    make_plan(m, taken, budget, batch_size)


@given(case=refusals(MACHINES[:1]))
def test_a_refusal_names_the_smallest_budget_of_a_cpu(case):
    m, taken, budget, batch_size = case
    budget["disk"] = AMPLE
    named = refused(case)
    assert set(named) == {"host_memory"}
    make_plan(m, taken, {**budget, "cpu": named["host_memory"]}, batch_size)
    with pytest.raises(ConfigError, match="host_memory of at least"):
        make_plan(m, taken, {**budget, "cpu": int(0.98 * named["host_memory"])}, batch_size)


def refused(case) -> dict[str, int]:
    """Setting -> the budget that the refusal names."""
    with pytest.raises(ConfigError, match="does not fit its memory budget, whatever the plan") as refusal:
        make_plan(*case)
    named: dict[str, int] = {}
    for setting, size in re.findall(r"(host_memory|max_memory|free disk) of at least ([\d.]+ \w+)", str(refusal.value)):
        named[setting] = max(named.get(setting, 0), parse_size(size))  # one setting for all GPUs
    return named


def setting_of(pool: str) -> str:
    return {"cpu": "host_memory", "disk": "free disk"}.get(pool, "max_memory")


@given(case=cases())
def test_samples_run_one_at_a_time_where_the_measurements_ask_for_it(case):
    m, *rest = case
    assert planned((dataclasses.replace(m, one_at_a_time=True), *rest)).micro_batch == 1


@pytest.mark.parametrize(
    ("blocks", "chain"),
    [
        ((0, 0, 1, 1), True),
        ((1, 1), True),
        ((0, 1, None), True),
        ((None, 0, 1), False),
        ((0, None, 1), False),
        ((None, None), False),
    ],
)
def test_layer_by_layer_only_where_no_target_lies_before_or_between_the_blocks(blocks, chain):
    """The budget holds one block's sums, and only part of the sweep's activations."""
    found = measured(blocks, activations={"cpu": 1000 * MIB})
    host = (100 + 2 * 2 * 8 + 3 * 8 + 3) * MIB
    if chain:
        assert plan_within(host, found=found).mode == "layerwise"
        found = dataclasses.replace(found, blocks=0)  # as if they did not run in the order of the list
    with pytest.raises(ConfigError, match=r"host_memory of at least 1\.08 GiB"):
        plan_within(host, found=found)


# By hand: 4 layers, 8 MiB of sums each and set, 10 MiB of activations a sample.


@pytest.mark.parametrize(
    ("changes", "cost"),
    [
        ({}, 2),  # forward, and all the way back
        ({"formed": 4 * 2**20}, 3),  # and the weights' gradients themselves
        ({"recomputes": True}, 3),  # and forward again
    ],
)
def test_with_memory_to_spare_it_is_one_sweep_forward_and_back(changes, cost):
    plan = plan_within(AMPLE, **changes)
    assert (plan.mode, plan.sums_place, plan.micro_batch) == ("grouped", "device", 4)
    assert plan.groups == (("layer3", "layer2", "layer1", "layer0"),)
    assert plan.cost == pytest.approx(cost * (1 + 64 / (4 * 640)))
    assert plan.peak == {"cpu": (100 + 2 * 4 * 8 + 4 * 10) * MIB}


def test_a_sweep_goes_back_no_further_than_the_lowest_target():
    found = measured()
    upper = dataclasses.replace(found, layers=found.layers[2:])
    assert plan_within(AMPLE, found=upper).cost == pytest.approx(1.5 * (1 + 64 / (4 * 640)))


def test_with_less_memory_there_are_more_sweeps_and_the_first_is_the_short_one():
    """The top group is a single layer, whose sweep goes back a quarter of the way."""
    plan = plan_within((100 + 2 * 3 * 8 + 24) * MIB, blocks=4 * (None,), activations={"cpu": MIB})
    assert plan.groups == (("layer3",), ("layer2", "layer1", "layer0"))
    assert plan.cost == pytest.approx((1 + 0.25 + 1 + 1) * (1 + 64 / (4 * 640)))


def test_with_even_less_memory_it_goes_layer_by_layer():
    plan = plan_within((100 + 2 * 2 * 8 + 24 + 3) * MIB)
    assert (plan.mode, plan.inputs_place) == ("layerwise", "device")
    assert plan.groups == (("layer3", "layer2"), ("layer1", "layer0"))
    assert plan.cost == pytest.approx(3 * (1 + 64 / (4 * 640)))
    assert plan.peak == {"cpu": (100 + 2 * 2 * 8 + 24 + 3) * MIB}


def test_on_a_gpu_the_sums_go_to_the_host_before_they_go_to_the_disk():
    found = measured(4 * (None,), ("cuda:0",), tokens=10**9)
    taken = {"cuda:0": 100 * MIB, "cpu": 50 * MIB}
    tight = {"cuda:0": (100 + 40) * MIB, "disk": AMPLE}
    plan = make_plan(found, taken, {**tight, "cpu": AMPLE}, 4)
    assert (plan.sums_place, plan.peak) == ("host", {"cuda:0": 140 * MIB, "cpu": (50 + 64) * MIB})
    plan = make_plan(found, taken, {**tight, "cpu": 50 * MIB}, 4)
    assert (plan.sums_place, plan.peak) == ("disk", {"cuda:0": 140 * MIB, "disk": 64 * MIB})


def test_on_a_gpu_the_blocks_inputs_go_to_the_host_in_pinned_powers_of_two():
    """24 MiB of inputs and 5 MiB of masks; a batch of 4 samples is 2 MiB."""
    changes = {"activations": {"cuda:0": 100 * MIB}, "arguments": 5 * MIB, "tokens": 10**6}
    found = measured((0, 1, None), ("cuda:0",), block_input=8 * MIB, **changes)
    budget = {"cuda:0": (100 + 2 * 8 + 24) * MIB, "cpu": AMPLE, "disk": 0}
    plan = make_plan(found, {"cuda:0": 100 * MIB, "cpu": 50 * MIB}, budget, 4)
    assert (plan.mode, plan.inputs_place) == ("layerwise", "host")
    assert plan.groups == (("layer2",), ("layer1",), ("layer0",))
    assert plan.peak == {"cuda:0": 140 * MIB, "cpu": (50 + 24 + 5) * MIB}
    crossing = 4 * (24 + 5) * MIB * 5_000 / (2 * 3 * 2**20 * 10**6)
    assert plan.cost == pytest.approx((3 + crossing) * (1 + 64 * 16 / (4 * 10**6)))
    plan = make_plan(dataclasses.replace(found, block_input=12 * MIB), {"cuda:0": 100 * MIB}, budget, 4)
    assert plan.peak["cpu"] == int((36 + 5) * MIB * 4 / 3), "batches of 3 MiB take 4"


def test_layers_of_two_gpus_are_counted_where_they_are():
    found = measured(4 * (None,), ("cuda:0", "cuda:1"))
    taken = {"cuda:0": 100 * MIB, "cuda:1": 200 * MIB, "cpu": 0}
    plan = make_plan(found, taken, {"cuda:0": AMPLE, "cuda:1": AMPLE, "cpu": AMPLE, "disk": AMPLE}, 4)
    assert plan.peak == {"cuda:0": (100 + 2 * 2 * 8 + 40) * MIB, "cuda:1": (200 + 2 * 2 * 8 + 40) * MIB}


def test_a_refusal_says_what_was_expected_what_was_found_and_what_to_do():
    """The smallest plan has one layer per sweep and its sums on the disk; it needs an edit's three copies."""
    with pytest.raises(ConfigError, match="does not fit its memory budget") as refusal:
        plan_within(110 * MIB, batch_size=1, blocks=4 * (None,), disk=AMPLE)
    assert str(refusal.value) == (
        "this run does not fit its memory budget, whatever the plan: expected host_memory of at least 125 MiB (found "
        "110 MiB), of which 100 MiB is in use already. With that budget it would run 1 sample(s) at a time, 4 sweeps "
        "from the top down. Raise the budget, use granularity='factor' in place of 'delta', or lower max_length"
    )


def test_fixed_bytes_are_added_whatever_the_batch_size():
    plan = plan_within(AMPLE, fixed={"cpu": 7 * MIB})
    assert plan.peak == {"cpu": (100 + 2 * 4 * 8 + 4 * 10 + 7) * MIB}


def test_layer_by_layer_keeps_the_masks():
    plan = plan_within((159 + 5) * MIB, arguments=5 * MIB)
    assert plan.peak == {"cpu": (159 + 5) * MIB}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: plan_within(2**30),
            ["4 layers", "1 sweep", "4 samples at a time", "204 MiB of 1 GiB on the host", "2.05"],
        ),
        (
            lambda: plan_within(172 * MIB, blocks=4 * (None,), activations={"cpu": MIB}),
            ["2 sweeps", "from the top down", "layer3", "layer2 to layer0", "172 MiB of 172 MiB on the host", "3.33"],
        ),
        (
            lambda: plan_within(159 * MIB, batch_size=1),
            ["layer by layer", "2 blocks", "inputs kept on the device", "1 sample at a time", "of 159 MiB", "3.30"],
        ),
        (
            lambda: plan_within(100 * MIB + 24 * MIB, batch_size=1, blocks=4 * (None,), disk=2**30),
            ["1 sweep", "sums on the disk", "64 MiB of 1 GiB on the disk"],
        ),
    ],
    ids=["one sweep", "two sweeps", "layer by layer", "disk"],
)
def test_a_plan_describes_itself(make, said):
    plan = make()
    assert str(plan).startswith("plan: ")
    for part in (*said, "forward-equivalents (a plain LoRA forward and backward is 2)"):
        assert part in str(plan), str(plan)


@given(case=cases())
def test_a_plan_survives_a_round_trip_through_json(case):
    plan = planned(case)
    assert Plan.from_dict(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
