"""Each loss against an obvious one, sample by sample; bounds and limits that its paper states."""

import math

import builders
import pytest
import torch
from torch.nn.functional import cross_entropy

from peft_perta.data import IGNORED, batches, load_samples, padded
from peft_perta.model import completion_logits, completion_states, preserved
from peft_perta.training import FORGET_LOSSES, REFERENCE, RETAIN_LOSSES
from peft_perta.training.losses.loss import OWN, REFUSAL, REFUSAL_REFERENCE
from peft_perta.training.losses.loss_inputs import LossInputs

LOSSES = FORGET_LOSSES | RETAIN_LOSSES
BETA, MARGIN = 0.7, 0.4


@pytest.fixture(scope="module")
def model():
    return builders.adapted_llama(torch.float64)


def logits_of(model, sample, adapters):
    """[t, V], of the tokens with loss, without padding."""
    with preserved(model, adapters), torch.no_grad():
        logits = model(input_ids=sample.input_ids.unsqueeze(0)).logits[0, :-1]
    return logits[sample.labels[1:] != IGNORED], sample.labels[1:][sample.labels[1:] != IGNORED]


def first_block(model):
    return model.get_submodule("base_model.model.model.layers.0")


def states_of(model, sample, adapters):
    """[t, H], what the first block puts out where a token with loss comes next."""
    with preserved(model, adapters), torch.no_grad():
        states = model(input_ids=sample.input_ids.unsqueeze(0), output_hidden_states=True).hidden_states[1][0, :-1]
    return states[sample.labels[1:] != IGNORED]


def oracle(name, model, sample, refusal):
    stacks = {OWN: ["forget", "task"], REFERENCE: ["task"]}
    if LOSSES[name].needs_states:
        own, reference = (states_of(model, sample, stacks[which]) for which in (OWN, REFERENCE))
        u = torch.rand(own.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        total = 0.0
        for h, h_reference in zip(own, reference, strict=True):
            length = BETA * math.sqrt(sum(float(x) ** 2 for x in h_reference))
            target = length * u / math.sqrt(sum(float(x) ** 2 for x in u)) if name == "rmu" else h_reference
            total += sum(float(a - b) ** 2 for a, b in zip(h, target, strict=True)) / len(h)
        return total / len(own)
    logits = {which: logits_of(model, sample, stack) for which, stack in stacks.items()}
    log_p = {
        which: -sum(cross_entropy(row, of) for row, of in zip(*found, strict=True)) for which, found in logits.items()
    }
    refused = {
        which: -cross_entropy(*logits_of(model, refusal, stack), reduction="sum") for which, stack in stacks.items()
    }
    length = len(logits[OWN][1])
    ratio = math.exp(log_p[OWN] - log_p[REFERENCE])
    if name == "gradient-ascent":
        return log_p[OWN] / length
    if name == "nll":
        return -log_p[OWN] / length
    if name == "npo":
        return 2 / BETA * math.log(1 + ratio**BETA)
    if name == "simnpo":
        return -2 / BETA * math.log(1 / (1 + math.exp(-(-BETA / length * log_p[OWN] - BETA * MARGIN))))
    if name == "dpo":
        gain = math.exp(refused[OWN] - refused[REFERENCE]) / ratio
        return -2 / BETA * math.log(1 / (1 + gain**-BETA))
    total = 0.0
    for own, reference in zip(logits[OWN][0].softmax(1), logits[REFERENCE][0].softmax(1), strict=True):
        total += sum(float(p * (p / q).log()) for p, q in zip(reference, own, strict=True))
    return total / length


def readings_of(model, samples, refusals):
    order = list(range(len(samples)))
    found = {}
    for which, stack in ((OWN, ["forget", "task"]), (REFERENCE, ["task"])):
        with preserved(model, stack):
            for name, rows in ((which, samples), ({OWN: REFUSAL, REFERENCE: REFUSAL_REFERENCE}[which], refusals)):
                batch = padded(rows, order)
                logits, states = completion_states(model, batch, first_block(model))
                found[name] = LossInputs(logits, batch.labels, states)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_the_obvious_loop_gives(name, model):
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    refusals = [samples[i] for i in (4, 3, 2, 1, 0)]  # any completions will do
    found = LOSSES[name].function(readings_of(model, samples, refusals), BETA, MARGIN)
    expected = [float(oracle(name, model, *pair)) for pair in zip(samples, refusals, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def reading(logits, label=0):
    return LossInputs(torch.tensor([logits], dtype=torch.float64), torch.tensor([[IGNORED, label]]))


def test_npo_starts_at_its_own_value_and_goes_to_zero():
    """At the reference 2/beta log 2; forgotten, 0: it has a bound, gradient ascent has none."""
    half = {OWN: reading([0.0, 0.0]), REFERENCE: reading([0.0, 0.0])}
    npo = FORGET_LOSSES["npo"].function
    assert float(npo(half, 0.1, 0.0)) == pytest.approx(20 * math.log(2))
    gone = {OWN: reading([-1e4, 0.0]), REFERENCE: reading([0.0, 0.0])}
    assert float(npo(gone, 0.1, 0.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(FORGET_LOSSES["gradient-ascent"].function(gone, 0.0, 0.0)) == -1e4


def test_small_beta_makes_npo_gradient_ascent():
    logits = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, 0]])
    readings = {OWN: LossInputs(logits, labels), REFERENCE: reading([0.0, 1.0, 2.0])}
    gradients = [
        torch.autograd.grad(FORGET_LOSSES[name].function(readings, 1e-6, 0.0).sum(), logits)[0]
        for name in ("npo", "gradient-ascent")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_dpo_is_npo_where_the_refusals_ratio_is_one():
    readings = {OWN: reading([2.0, 0.0]), REFERENCE: reading([0.0, 1.0])}
    same = {REFUSAL: reading([1.0, 3.0]), REFUSAL_REFERENCE: reading([1.0, 3.0])}
    assert float(FORGET_LOSSES["dpo"].function(readings | same, 0.3, 0.0)) == pytest.approx(
        float(FORGET_LOSSES["npo"].function(readings, 0.3, 0.0))
    )


def test_rmu_is_zero_where_it_steers_to():
    reference = reading([0.0, 0.0])
    states = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    u = torch.rand(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = LossInputs(reference.logits, reference.labels, states)
    there = LossInputs(reference.logits, reference.labels, 2 * 5 * (u / u.norm()).unsqueeze(0))
    rmu = FORGET_LOSSES["rmu"].function
    assert float(rmu({OWN: there, REFERENCE: reference}, 2.0, 0.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(rmu({OWN: reference, REFERENCE: reference}, 0.0, 0.0)) == pytest.approx(25 / 2)


def test_kl_of_the_reference_itself_is_zero():
    assert float(RETAIN_LOSSES["kl"].function({OWN: reading([1.0, 2.0]), REFERENCE: reading([1.0, 2.0])}, 0, 0)) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_the_batch(name, model):
    """One value a sample, whatever stands beside it."""
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    whole = LOSSES[name].function(readings_of(model, samples, samples), BETA, MARGIN)
    assert whole.shape == (len(samples),)
    for index, sample in enumerate(samples):
        alone = LOSSES[name].function(readings_of(model, [sample], [sample]), BETA, MARGIN)
        torch.testing.assert_close(alone, whole[index : index + 1], rtol=1e-9, atol=1e-12)


def test_the_logits_are_those_of_the_tokens_with_loss(model):
    (batch,) = batches(load_samples(builders.forget_rows(), builders.tokenizer()), 8)
    with preserved(model, []), torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = completion_logits(model, batch)
        assert found.equal(completion_states(model, batch, first_block(model))[0])
    torch.testing.assert_close(found, whole[:, :-1][batch.labels[:, 1:] != IGNORED])
