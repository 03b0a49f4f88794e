"""The fit's KL against a plain loop over tokens, with the edits written into the weights."""

import copy

import builders
import laws
import oracles
import pytest
import torch

from peft_perta import UnsupportedLayerError
from peft_perta.adapters import add_adapter
from peft_perta.data import load_samples


def by_hand(dense, fitted, samples):
    """KL(p || q), token by token; p and q are those of models with edited weights."""
    total = []
    for sample in samples:
        with torch.no_grad():
            p, q = (m(input_ids=sample.input_ids.unsqueeze(0)).logits[0].double().softmax(-1) for m in (dense, fitted))
        for position in range(1, len(sample.labels)):
            if sample.labels[position] != -100:
                total.append(float((p[position - 1] * (p[position - 1] / q[position - 1]).log()).sum()))
    return sum(total) / len(total)


def edited(model, deltas):
    plain, weights = oracles.plain_model(model, [])
    for name, weight in weights.items():
        weight.data += deltas[name].to(weight.dtype)
    return copy.deepcopy(plain)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_is_the_kl_between_the_edited_models(batch_size):
    model, rows = builders.adapted_llama(), builders.retain_rows()
    dense = laws.deltas_of(builders.negate(model, granularity="delta", rank=64, strength=3.0)[1])
    with laws.untouched(model):
        _, state_dict, provenance = builders.negate(
            model, granularity="delta", rank=1, strength=3.0, fit_kl_samples=3, batch_size=batch_size
        )
    samples = load_samples(rows, builders.tokenizer())[:3]
    expected = by_hand(edited(model, dense), edited(model, laws.deltas_of(state_dict)), samples)
    assert expected > 1e-3
    assert provenance.fit_kl == pytest.approx(expected, rel=1e-3)


def test_an_exact_fit_needs_no_measurement():
    assert builders.negate(builders.adapted_llama())[2].fit_kl == 0.0
    assert builders.negate(builders.adapted_llama(), granularity="delta", rank=2)[2].fit_kl is None


def test_a_larger_rank_is_closer():
    found = [
        builders.negate(builders.adapted_llama(), granularity="delta", rank=rank, fit_kl_samples=4)[2].fit_kl
        for rank in (1, 4, 16)
    ]
    assert found == sorted(found, reverse=True)


def test_on_a_4_bit_base_and_conv1d():
    for build in (builders.adapted_nf4_llama, builders.adapted_gpt2):
        model = build()
        with laws.untouched(model):
            provenance = builders.negate(model, granularity="delta", rank=1, fit_kl_samples=2)[2]
        assert 0 < provenance.fit_kl < 10


def test_experts_are_refused_before_any_gradient():
    with pytest.raises(UnsupportedLayerError, match="fit_kl_samples needs the layer's inputs"):
        builders.negate(builders.adapted_mixtral(), fit_kl_samples=2)


def test_nothing_is_left_on_the_model():
    model = builders.adapted_llama()
    before = set(model.peft_config)
    config, state_dict, _ = builders.negate(model, granularity="delta", rank=1, fit_kl_samples=2)
    assert set(model.peft_config) == before
    add_adapter(model, config, state_dict, "perta_fit_kl")
