"""Each loss against an obvious loop over the samples; bounds and limits that its paper states."""

import math

import builders
import pytest
import tables
import torch

from peft_perta.data import IGNORED, batches, load_samples, padded
from peft_perta.model import completion_logits, completion_states, preserved
from peft_perta.training import FORGET_LOSSES, RETAIN_LOSSES, ForwardPass
from peft_perta.training.losses import LossInputs

LOSSES = FORGET_LOSSES | RETAIN_LOSSES
BETA, MARGIN = 0.7, 0.4
MODEL, REFERENCE = ForwardPass.MODEL, ForwardPass.REFERENCE
MODEL_ON_REFUSALS, REFERENCE_ON_REFUSALS = ForwardPass.MODEL_ON_REFUSALS, ForwardPass.REFERENCE_ON_REFUSALS
STACKS = ["forget", "task"], ["task"]  # of the model and of the reference model


@pytest.fixture(scope="module")
def model():
    return builders.adapted_llama(torch.float64)


def distributions_of(model, sample, adapters):
    """Next-token log probabilities [t, V] at the tokens with loss, and these tokens [t]; without padding."""
    with preserved(model, adapters), torch.no_grad():
        logits = model(input_ids=sample.input_ids.unsqueeze(0)).logits[0, :-1]
    carries_loss = sample.labels[1:] != IGNORED
    return logits[carries_loss].log_softmax(1), sample.labels[1:][carries_loss]


def log_p_of(model, sample, adapters):
    return sum(float(row[token]) for row, token in zip(*distributions_of(model, sample, adapters), strict=True))


def first_block(model):
    return model.get_submodule("base_model.model.model.layers.0")


def states_of(model, sample, adapters):
    """[t, H], the output of the first block at the positions whose next token carries loss."""
    with preserved(model, adapters), torch.no_grad():
        states = model(input_ids=sample.input_ids.unsqueeze(0), output_hidden_states=True).hidden_states[1][0, :-1]
    return states[sample.labels[1:] != IGNORED]


def plain_sample(model, sample, refusal):
    distributions = [distributions_of(model, sample, stack)[0].exp().tolist() for stack in STACKS]
    states = [states_of(model, sample, stack).tolist() for stack in STACKS]
    return tables.LossSample(
        *(log_p_of(model, sample, stack) for stack in STACKS),
        *(log_p_of(model, refusal, stack) for stack in STACKS),
        list(zip(*distributions, strict=True)),
        list(zip(*states, strict=True)),
        BETA,
        MARGIN,
    )


def inputs_of(model, samples, refusals):
    order = list(range(len(samples)))
    inputs = {}
    passes = [(MODEL, samples), (REFERENCE, samples), (MODEL_ON_REFUSALS, refusals), (REFERENCE_ON_REFUSALS, refusals)]
    for forward_pass, rows in passes:
        with preserved(model, STACKS[forward_pass.of_reference]):
            batch = padded(rows, order)
            logits, states = completion_states(model, batch, first_block(model))
            inputs[forward_pass] = LossInputs(logits, batch.labels, states)
    return inputs


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_the_obvious_loop_gives(name, model):
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    refusals = [samples[i] for i in (4, 3, 2, 1, 0)]  # any completions will do
    values = LOSSES[name].function(inputs_of(model, samples, refusals), BETA, MARGIN)
    loop = tables.LOSSES[name].loop
    expected = [loop(plain_sample(model, *pair)) for pair in zip(samples, refusals, strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_golden(name):
    row, sample = tables.LOSSES[name], tables.PENCIL_SAMPLE

    def outputs(probability, state=0.0):
        return LossInputs(
            torch.tensor([[probability, 1 - probability]], dtype=torch.float64).log(),
            torch.tensor([[IGNORED, 0]]),
            torch.tensor([[state]], dtype=torch.float64),
        )

    inputs = {MODEL: outputs(3 / 4, 3.0), REFERENCE: outputs(1 / 2, -2.0)}
    inputs |= {MODEL_ON_REFUSALS: outputs(1 / 3), REFERENCE_ON_REFUSALS: outputs(1 / 2)}
    value = float(LOSSES[name].function(inputs, sample.beta, sample.margin))
    assert value == pytest.approx(row.golden), row.source
    assert row.loop(sample) == pytest.approx(row.golden), row.source


def outputs_of(logits, label=0):
    return LossInputs(torch.tensor([logits], dtype=torch.float64), torch.tensor([[IGNORED, label]]))


def test_npo_is_bounded_and_gradient_ascent_is_not():
    """NPO is 2/beta log 2 at the reference model and goes to 0 as the completion is forgotten."""
    equal = {MODEL: outputs_of([0.0, 0.0]), REFERENCE: outputs_of([0.0, 0.0])}
    npo = FORGET_LOSSES["npo"].function
    assert float(npo(equal, 0.1, 0.0)) == pytest.approx(20 * math.log(2))
    forgotten = {MODEL: outputs_of([-1e4, 0.0]), REFERENCE: outputs_of([0.0, 0.0])}
    assert float(npo(forgotten, 0.1, 0.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(FORGET_LOSSES["gradient-ascent"].function(forgotten, 0.0, 0.0)) == -1e4


def test_small_beta_makes_npo_gradient_ascent():
    logits = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, 0]])
    inputs = {MODEL: LossInputs(logits, labels), REFERENCE: outputs_of([0.0, 1.0, 2.0])}
    gradients = [
        torch.autograd.grad(FORGET_LOSSES[name].function(inputs, 1e-6, 0.0).sum(), logits)[0]
        for name in ("npo", "gradient-ascent")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_dpo_is_npo_if_both_models_agree_on_the_refusal():
    inputs = {MODEL: outputs_of([2.0, 0.0]), REFERENCE: outputs_of([0.0, 1.0])}
    same = {MODEL_ON_REFUSALS: outputs_of([1.0, 3.0]), REFERENCE_ON_REFUSALS: outputs_of([1.0, 3.0])}
    assert float(FORGET_LOSSES["dpo"].function(inputs | same, 0.3, 0.0)) == pytest.approx(
        float(FORGET_LOSSES["npo"].function(inputs, 0.3, 0.0))
    )


def test_rmu_is_zero_at_its_target():
    reference = outputs_of([0.0, 0.0])
    states = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    u = torch.rand(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = LossInputs(reference.logits, reference.labels, states)
    at_target = LossInputs(reference.logits, reference.labels, 2 * 5 * (u / u.norm()).unsqueeze(0))
    rmu = FORGET_LOSSES["rmu"].function
    assert float(rmu({MODEL: at_target, REFERENCE: reference}, 2.0, 0.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(rmu({MODEL: reference, REFERENCE: reference}, 0.0, 0.0)) == pytest.approx(25 / 2)


def test_kl_of_the_reference_model_from_itself_is_zero():
    same = {MODEL: outputs_of([1.0, 2.0]), REFERENCE: outputs_of([1.0, 2.0])}
    assert float(RETAIN_LOSSES["kl"].function(same, 0, 0)) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_the_batch(name, model):
    """One value per sample, whatever the other samples are."""
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    whole = LOSSES[name].function(inputs_of(model, samples, samples), BETA, MARGIN)
    assert whole.shape == (len(samples),)
    for index, sample in enumerate(samples):
        alone = LOSSES[name].function(inputs_of(model, [sample], [sample]), BETA, MARGIN)
        torch.testing.assert_close(alone, whole[index : index + 1], rtol=1e-9, atol=1e-12)


def test_the_logits_are_those_of_the_tokens_with_loss(model):
    (batch,) = batches(load_samples(builders.forget_rows(), builders.tokenizer()), 8)
    with preserved(model, []), torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits = completion_logits(model, batch)
        assert logits.equal(completion_states(model, batch, first_block(model))[0])
    torch.testing.assert_close(logits, whole[:, :-1][batch.labels[:, 1:] != IGNORED])
