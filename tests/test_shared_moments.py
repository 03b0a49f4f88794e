"""Second moments: the upper half against a loop over tokens; and shared products against every layer by itself, bit for
bit."""

from contextlib import closing
from dataclasses import replace

import builders
import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta.data import Sample, load_samples
from peft_perta.gradients import Collector, GradientSums, Gram, InputMoments, Plan, gather, gradient_sums
from peft_perta.gradients import _shared_moments as shared_moments
from peft_perta.gradients.gradient_sums import PLACES
from peft_perta.perta import GRANULARITIES

SETS = {
    "forget": load_samples(builders.forget_rows(), builders.tokenizer()),
    "retain": load_samples(builders.retain_rows(), builders.tokenizer()),
}
modes = pytest.mark.parametrize("mode", ["grouped", "layerwise"])


def drawn(N, T, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, T, width, generator=generator, dtype=torch.float64).to(dtype)
    return Gram(x, torch.rand(N, T, 1, generator=generator) < 0.7)


def by_the_loop(grams):
    """sum_t x_t x_t^T over the tokens that count, one token at a time, in float64."""
    total = torch.zeros(grams[0].x.shape[-1], grams[0].x.shape[-1], dtype=torch.float64)
    for gram in grams:
        for x, counted in zip(gram.x.double().flatten(0, -2), gram.counted.flatten(), strict=True):
            if counted:
                total += torch.outer(x, x)
    return total


def alone(grams, place="device", name="inputs"):
    """The completed sum of one layer that shares nothing."""
    sums = GradientSums("mean", place)
    for gram in grams:
        sums.add({}, {name: gram}, samples=1)
    sums.complete()
    return sums.moments[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", PLACES)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
    width=st.integers(1, 21),
    blocks=st.integers(1, 30),
    chunk=st.integers(1, 500),
)
def test_half_of_the_products_are_the_whole_moment(place, dtype, sizes, width, blocks, chunk):
    """Whatever the blocks of rows, also where they do not divide the width."""
    grams = [drawn(N, T, width, seed, dtype) for seed, (N, T) in enumerate(sizes)]
    held = gradient_sums._GRAM_BLOCKS, gradient_sums._GRAM_CHUNK
    gradient_sums._GRAM_BLOCKS, gradient_sums._GRAM_CHUNK = blocks, chunk
    try:
        found = alone(grams, place)
    finally:
        gradient_sums._GRAM_BLOCKS, gradient_sums._GRAM_CHUNK = held
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), by_the_loop(grams), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, alone(grams)) or (blocks, chunk) != held


def test_flattened_samples_and_tokens_that_are_masked_away():
    gram = drawn(2, 5, 9, 0)
    flat = Gram(gram.x.flatten(0, 1), gram.counted.flatten(0, 1))
    assert torch.equal(alone([flat]), alone([gram]))
    assert not alone([replace(gram, counted=torch.zeros_like(gram.counted))]).any()


def test_autocast_does_not_lower_the_precision():
    """The last moment of a batch is added outside of the backward pass, where a user's autocast may be on."""
    gram = drawn(2, 50, 9, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = alone([gram])
    assert torch.equal(found, alone([gram]))


def test_completing_twice_changes_nothing():
    sums = GradientSums("mean")
    sums.add({}, {"inputs": drawn(2, 5, 9, 0)}, samples=2)
    sums.complete()
    before = sums.moments["inputs"].clone()
    sums.complete()
    assert torch.equal(sums.moments["inputs"], before)


@given(
    visits=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12),
    flushes=st.sets(st.integers(0, 11)),
)
def test_sharing_changes_no_bit(visits, flushes):
    """Layers come in any order, with the same input or another, and with the same tokens or others."""
    inputs = [drawn(2, 5, 9, seed).x for seed in range(2)]
    masks = [drawn(2, 5, 9, seed).counted for seed in range(2)]
    shared, layers, of_layer = shared_moments.SharedMoments(), {}, {}
    for number, (layer, which, mask) in enumerate(visits):
        gram = Gram(inputs[which].detach(), masks[mask].clone())
        shared.add("inputs", gram, layers.setdefault(layer, GradientSums("mean")))
        of_layer.setdefault(layer, []).append(gram)
        if number in flushes:
            shared.flush()
    shared.flush()
    for layer, sums in layers.items():
        sums.complete()
        assert torch.equal(sums.moments["inputs"], alone(of_layer[layer]))


def test_equal_values_in_other_memory_and_other_tokens_are_not_shared():
    gram = drawn(2, 5, 9, 0)
    assert gram.equals(Gram(gram.x.detach(), gram.counted.clone()))
    assert not gram.equals(replace(gram, x=gram.x.clone()))
    assert not gram.equals(replace(gram, x=gram.x[:, :, :8]))
    assert not gram.equals(replace(gram, counted=~gram.counted))
    assert not gram.equals(Gram(gram.x[:1], gram.counted[:1]))


@given(values=st.lists(st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 2.0, -3.0, float("nan"), float("inf")]), min_size=4))
def test_the_loss_flows_through_tokens_with_any_gradient(values):
    g = torch.tensor(values[: len(values) // 2 * 2]).reshape(1, 2, -1)
    target = laws.job_of(builders.adapted_llama(), SETS).targets[0]
    found = InputMoments().moments(target, torch.ones(1, 2, 3), g)["inputs"].counted
    assert torch.equal(found, (g != 0).any(-1, keepdim=True))


# Models

QKV, GATE_UP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


def whole_and_answers():
    """The first two samples have a loss at every token, the next two at their last tokens alone."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(4):
        ids = torch.randint(3, builders.tokenizer().vocab_size, (12,), generator=generator)
        labels = ids.clone()
        if number >= 2:
            labels[:8] = -100
        samples.append(Sample(ids, labels))
    return {"forget": samples, "retain": samples[::-1]}


def job(model, sets, **settings):
    collector = Collector((GRANULARITIES["factor"],), (InputMoments(),))
    return replace(laws.job_of(model, sets, "factor"), collector=collector, **settings)


def moments(job, mode, micro_batch=2, place="device"):
    """(set, layer, name) -> moment."""
    names = tuple(target.name for target in reversed(job.targets))
    found = {}
    with closing(gather(job, Plan(mode, (names,), place, place, micro_batch))) as groups:
        for _, of_sets in groups:
            for set_name, of_set in of_sets.items():
                for layer, sums in of_set.items():
                    found |= {(set_name, layer, name): moment for name, moment in sums.moments.items()}
    return found


def one_by_one(model, sets, **settings):
    whole = job(model, sets)
    found = {}
    for target in whole.targets:
        found |= moments(replace(whole, targets=[target]), "grouped", **settings)
    return found


def same_bits(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(moment.norm() > 0 for moment in found.values())


@pytest.fixture
def shared(monkeypatch):
    """The number of layers that each product was formed for."""
    counts = []
    add = shared_moments.add_gram
    monkeypatch.setattr(shared_moments, "add_gram", lambda of, *rest: (counts.append(len(of)), add(of, *rest))[1])
    return counts


@modes
@pytest.mark.parametrize("build", [builders.adapted_llama, builders.adapted_phi3, builders.adapted_mixtral])
@pytest.mark.parametrize("place", PLACES)
def test_every_layer_has_the_bits_that_it_has_by_itself(build, mode, place):
    """For samples with questions and answers: in the last block queries see fewer tokens than keys and values."""
    model = build()
    same_bits(moments(job(model, SETS), mode, place=place), one_by_one(model, SETS))


@modes
def test_tokens_that_are_the_same_in_one_batch_and_others_in_the_next(mode, shared):
    """In the last block queries share with keys and values in the first batch, and not in the second."""
    model, sets = builders.adapted_llama(), whole_and_answers()
    expected = one_by_one(model, sets)
    assert set(shared) == {1}
    shared.clear()
    same_bits(moments(job(model, sets), mode), expected)
    assert {2, 3} <= set(shared), "products are shared in pairs and in threes"
    assert sum(shared) == 14 * 4, "7 layers, 2 blocks and 2 batches of 2 sets"
    assert len(shared) < sum(shared)


def test_queries_keys_and_values_and_gate_and_up_share(shared):
    """With a loss at every token."""
    model, sets = builders.adapted_llama(), {"forget": whole_and_answers()["forget"][:2]}
    found = moments(job(model, sets), "grouped")
    assert sorted(shared) == sorted(2 * [len(QKV), len(GATE_UP), 1, 1])
    for block in (0, 1):
        for group in ([f"self_attn.{name}" for name in QKV], [f"mlp.{name}" for name in GATE_UP]):
            one, *others = (found["forget", f"model.layers.{block}.{name}", "inputs"] for name in group)
            assert all(torch.equal(one, other) and one is not other for other in others)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_checkpointing_shares_as_well(reentrant, shared):
    model, sets = builders.adapted_llama(), whole_and_answers()
    expected = moments(job(model, sets), "grouped")
    counts = sorted(shared)
    shared.clear()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_base_model().disable_input_require_grads()
    model.train()
    same_bits(moments(job(model, sets), "grouped"), expected)
    assert sorted(shared) == counts


def test_groups_that_part_layers_with_one_input_give_the_same_bits():
    model, sets = builders.adapted_llama(), whole_and_answers()
    whole = job(model, sets)
    some = [target for target in whole.targets if "v_proj" in target.name or "up_proj" in target.name]
    others = [target for target in whole.targets if target not in some]
    found = {}
    for targets in (some, others):
        found |= moments(replace(whole, targets=targets), "layerwise")
    same_bits(found, moments(whole, "grouped"))
