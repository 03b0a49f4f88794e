"""Each loss against an obvious loop over the samples; bounds and limits that its paper states."""

import math

import builders
import pytest
import tables
import torch

from peft_perta.data import IGNORED, batches, load_samples, padded
from peft_perta.model import completion_logits, completion_states, preserved
from peft_perta.training import FORGET_LOSSES, RETAIN_LOSSES, ForwardPass
from peft_perta.training.losses import LossInputs, loss_inputs

LOSSES = FORGET_LOSSES | RETAIN_LOSSES
BETA, MARGIN = 0.7, 0.4
MODEL, REFERENCE, ORIGIN = ForwardPass.MODEL, ForwardPass.REFERENCE, ForwardPass.ORIGIN
MODEL_ON_REFUSALS, REFERENCE_ON_REFUSALS = ForwardPass.MODEL_ON_REFUSALS, ForwardPass.REFERENCE_ON_REFUSALS
STACKS = ["forget", "task"], ["task"], []  # of the model, of the reference model and of the origin


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
    states = [states_of(model, sample, stack).tolist() for stack in STACKS[:2]]
    return tables.LossSample(
        *(log_p_of(model, sample, stack) for stack in STACKS[:2]),
        *(log_p_of(model, refusal, stack) for stack in STACKS[:2]),
        list(zip(*distributions, strict=True)),
        distributions_of(model, sample, [])[1].tolist(),
        list(zip(*states, strict=True)),
        BETA,
        MARGIN,
    )


def inputs_of(model, samples, refusals):
    order = list(range(len(samples)))
    inputs = {}
    for forward_pass in ForwardPass:
        with preserved(model, STACKS[2 if forward_pass is ORIGIN else forward_pass.is_frozen]):
            batch = padded(refusals if forward_pass.on_refusals else samples, order)
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

    inputs = {MODEL: outputs(3 / 4, 3.0), REFERENCE: outputs(1 / 2, -2.0), ORIGIN: outputs(1 / 4)}
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


def gradient_of(name, logits, beta, *, label=0, teacher=None):
    """The gradient [V] of a forget loss of one token with these logits."""
    logits = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    inputs = {MODEL: LossInputs(logits, torch.tensor([[IGNORED, label]]))}
    if teacher is not None:
        inputs |= dict.fromkeys((REFERENCE, ORIGIN), outputs_of(teacher, label))
    return torch.autograd.grad(LOSSES[name].function(inputs, beta, 0.0).sum(), logits)[0][0]


@pytest.mark.parametrize(("name", "importance"), [("wga", 0), ("satimp", 1)])
def test_weighted_ascent_is_ascent_with_a_weight_that_has_no_gradient(name, importance):
    logits = [1.0, 0.0, 0.5]
    p = float(torch.tensor(logits, dtype=torch.float64).softmax(0)[0])
    expected = p**1.5 * (1 - p) ** importance * gradient_of("gradient-ascent", logits, 0.0)
    torch.testing.assert_close(gradient_of(name, logits, 1.5), expected)
    torch.testing.assert_close(gradient_of("wga", logits, 1e-9), gradient_of("gradient-ascent", logits, 0.0))


def test_ihl_pulls_the_right_token_down_to_the_runner_up_and_leaves_the_others():
    """The gradients of p_right - p_runner-up, by hand: p_v (1[v = right] - p_right) - p_v (1[v = runner-up] - p_up)."""
    logits = [2.0, 1.0, 0.0]
    p = torch.tensor(logits, dtype=torch.float64).softmax(0)
    right, up = torch.eye(3, dtype=torch.float64)[:2]
    torch.testing.assert_close(gradient_of("ihl", logits, 0.0), p * (right - p[0]) - p * (up - p[1]))
    ends = [float(LOSSES["ihl"].function({MODEL: outputs_of(z)}, 0.0, 0.0)) for z in ([99.0, 0.0], [0.0, 99.0])]
    assert ends == pytest.approx([2.0, 0.0])


def test_undial_is_least_at_its_teacher():
    teacher = [2.0, 1.0, 0.0]
    torch.testing.assert_close(gradient_of("undial", [-1.0, 1.0, 0.0], 3.0, teacher=teacher), torch.zeros(3).double())
    assert gradient_of("undial", teacher, 3.0, teacher=teacher)[0] > 0


def test_ce_u_has_no_gradient_through_its_teacher():
    """p_right on the right token and -p_v p_right / (1 - p_right) on every other; nothing where it is forgotten."""
    logits = [2.0, 1.0, 0.0]
    p = torch.tensor(logits, dtype=torch.float64).softmax(0)
    expected = torch.cat([p[:1], -p[1:] * p[0] / (1 - p[0])])
    torch.testing.assert_close(gradient_of("ce-u", logits, 0.0), expected)
    assert gradient_of("ce-u", [-999.0, 1.0, 0.0], 0.0).abs().max() < 1e-12
    assert gradient_of("ce-u", [999.0, 1.0, 0.0], 0.0)[0] == pytest.approx(1.0)


def test_the_first_token_is_left_out_of_ce_u_alone(model):
    """A change of the first token's distribution changes ce-u by nothing, and every other loss."""
    samples = load_samples(builders.forget_rows()[:1], builders.tokenizer())
    before = inputs_of(model, samples, samples)
    after = inputs_of(model, samples, samples)
    after[MODEL].logits[0] += torch.linspace(0, 3, after[MODEL].logits.shape[1])
    read_logits = {name: loss.function for name, loss in LOSSES.items() if not loss.needs_states}
    unmoved = [n for n, f in read_logits.items() if torch.equal(f(before, BETA, MARGIN), f(after, BETA, MARGIN))]
    assert unmoved == ["ce-u"]


@pytest.mark.parametrize("name", ["kl", "origin-kl"])
def test_the_teacher_itself_is_where_a_divergence_is_zero(name):
    logits = [1.0, 2.0, -math.inf]  # a token that neither can say: 0 log 0 is 0
    same = dict.fromkeys((MODEL, REFERENCE, ORIGIN), outputs_of(logits))
    assert float(LOSSES[name].function(same, 0, 0)) == 0.0
    assert gradient_of(name, logits, 0.0, teacher=logits).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_states])
def test_a_loss_in_chunks_of_tokens_is_the_whole_loss(name, dtype, model, monkeypatch):
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    results = []
    for chunk in (2**23, 1):
        monkeypatch.setattr(loss_inputs, "_CHUNK", chunk)
        inputs = {
            key: LossInputs(of_pass.logits.to(dtype).requires_grad_(), of_pass.labels)
            for key, of_pass in inputs_of(model, samples, samples).items()
        }
        values = LOSSES[name].function(inputs, BETA, MARGIN)
        assert values.dtype == torch.promote_types(dtype, torch.float32)
        values = values, *torch.autograd.grad(values.sum(), [inputs[MODEL].logits])
        results.append(values)
    torch.testing.assert_close(*results, rtol=1e-5 if dtype == torch.bfloat16 else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ihl", "undial", "ce-u", "kl", "origin-kl", "wga"])
def test_no_wide_copy_of_the_logits_is_kept_for_backward(name, model):
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    inputs = inputs_of(model, samples, samples)
    inputs = {key: LossInputs(i.logits.bfloat16().requires_grad_(key is MODEL), i.labels) for key, i in inputs.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LOSSES[name].function(inputs, BETA, MARGIN).sum()
    assert not [t for t in kept if t.shape == inputs[MODEL].logits.shape and t.dtype != torch.bfloat16]


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
