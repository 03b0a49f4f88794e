"""Hooks against a loop over samples with dense autograd: layer kinds, granularities, gradient checkpointing."""

import builders
import laws
import pytest
import tables
import torch

from peft_perta import NumericalError, UnsupportedLayerError
from peft_perta.data import Sample, load_samples
from peft_perta.gradients import sweep

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*use_reentrant")
kinds = pytest.mark.parametrize("kind", tables.LAYERS)
granularities = pytest.mark.parametrize("granularity", tables.GRANULARITIES)
statistics = pytest.mark.parametrize("statistic", ["mean", "squares"])
gradients_at = pytest.mark.parametrize("adapters", [[], ["task"]], ids=["origin", "full"])


@pytest.fixture(scope="module")
def samples():
    return load_samples(builders.forget_rows(), builders.tokenizer())


@kinds
@granularities
@statistics
@gradients_at
def test_hooks_equal_the_loop(kind, granularity, statistic, adapters, samples):
    size = tables.batch_size(kind, statistic)
    laws.hooks_equal_the_loop(tables.LAYERS[kind](), samples, granularity, statistic, adapters, 1e-6, size)


@pytest.mark.parametrize("kind", tables.DOUBLES)
@granularities
@statistics
@gradients_at
def test_hooks_equal_the_loop_in_double_precision(kind, granularity, statistic, adapters, samples):
    laws.hooks_equal_the_loop(tables.DOUBLES[kind](), samples, granularity, statistic, adapters, 1e-10)


@kinds
@statistics
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("input_gradients", [True, False], ids=["inputs-require-grad", "inputs-do-not"])
def test_checkpointing_changes_nothing(kind, statistic, reentrant, input_gradients, samples):
    model = tables.LAYERS[kind]()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if input_gradients:
        model.enable_input_require_grads()
    else:
        model.get_base_model().disable_input_require_grads()  # transformers asks for them by itself
    model.train()
    with laws.untouched(model):
        size = tables.batch_size(kind, statistic)
        laws.hooks_equal_the_loop(model, samples, "factor", statistic, ["task"], 1e-6, size)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_turns_no_dropout_on(reentrant, samples):
    """transformers checkpoints only modules in training mode; the same flag turns on the dropout of OPT's layers."""
    model = builders.adapted_opt()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    with laws.untouched(model):
        laws.hooks_equal_the_loop(model, samples, "delta", "mean", ["task"], 1e-6)


def test_checkpointing_really_recomputes(samples):
    """Without recomputation, the test above would prove nothing."""
    model = builders.adapted_llama()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    calls = []
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    laws.swept(model, samples, "delta", "mean", [], batch_size=len(samples))
    handle.remove()
    assert len(calls) == 2


@kinds
def test_train_mode_and_dropout_are_ignored(kind, samples):
    """The adapters have dropout 0.3, GPT-2's blocks 0.1, and the user passes the model in train mode."""
    model = tables.LAYERS[kind]().train()
    with laws.untouched(model):
        laws.hooks_equal_the_loop(model, samples, "delta", "mean", ["task"], 1e-6)


@pytest.mark.parametrize(
    ("kind", "statistic"),
    [(k, s) for k in tables.LAYERS for s in ("mean", "squares") if tables.batch_size(k, s) > 1],
)
@granularities
def test_batches_do_not_matter(kind, granularity, statistic, samples):
    laws.batches_do_not_matter(tables.LAYERS[kind](), samples, granularity, statistic, 2e-6)


@pytest.mark.parametrize("kind", tables.ONE_AT_A_TIME)
@granularities
def test_squares_of_a_batch_whose_samples_share_one_gradient_are_refused(kind, granularity, samples):
    model = tables.LAYERS[kind]()
    with (
        laws.untouched(model),
        pytest.raises(ValueError, match="batches of one sample for statistic 'squares', found 2"),
    ):
        laws.swept(model, samples, granularity, "squares", [], 2)


def test_gradients_at_origin_see_no_adapter(samples):
    """With every adapter off, other numbers in the adapters change no gradient of the weights."""
    model = builders.adapted_llama()
    before = laws.swept(model, samples, "delta", "mean", [], 2)
    for name, parameter in model.named_parameters():
        if ".task." in name:
            parameter.data.mul_(3)
    after = laws.swept(model, samples, "delta", "mean", [], 2)
    assert all(torch.equal(before[name].gradients["weight"], after[name].gradients["weight"]) for name in before)
    full = laws.swept(model, samples, "delta", "mean", ["task"], 2)
    assert not any(torch.equal(before[name].gradients["weight"], full[name].gradients["weight"]) for name in before)


def test_gradients_are_taken_under_no_grad_too(samples):
    with torch.no_grad():
        laws.swept(builders.adapted_llama(), samples, "factor", "mean", [], 2)


def test_bfloat16_models_are_summed_in_float32(samples):
    sums = laws.swept(builders.adapted_llama(torch.bfloat16), samples, "delta", "squares", [], 2)
    assert {s.gradients["weight"].dtype for s in sums.values()} == {torch.float32}


def test_a_loss_that_is_not_finite_is_refused(samples):
    """The message names the sample, and the model is restored."""
    model = builders.adapted_llama()
    rows = [Sample(s.input_ids.clone(), s.labels.clone()) for s in samples]
    rows[3].input_ids[2] = 127  # a token that no other row has
    model.get_input_embeddings().weight.data[127] = torch.nan
    with laws.untouched(model), pytest.raises(NumericalError, match=r"the forget set, sample 4: the loss is nan"):
        laws.swept(model, rows, "factor", "mean", [], 1)


def test_a_gradient_that_is_not_finite_is_refused(samples):
    """A finite loss whose backward overflows, as in float16."""
    model = builders.adapted_llama()
    layer = model.get_base_model().model.layers[1]
    handle = layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * torch.inf,))
    try:
        with pytest.raises(NumericalError, match=r"layers\.0.*the gradient on the forget set is not finite"):
            laws.swept(model, samples, "factor", "mean", [], 2)
    finally:
        handle.remove()


def test_a_layer_without_gradients_is_refused(samples):
    """A layer whose output does not reach the loss gets no gradient. That is an error, not a weight of zero."""
    model = builders.adapted_llama()
    layer = model.get_base_model().model.layers[0].mlp
    handle = layer.register_forward_hook(lambda module, args, output: output.detach())
    try:
        with pytest.raises(NumericalError, match=r"expected gradients of 5 samples, found 0"):
            laws.swept(model, samples, "factor", "mean", [], 2)
    finally:
        handle.remove()


def flattened_llama():
    """A Llama with an MLP that flattens the batch: its layers do not know which token belongs to which sample."""
    model = builders.adapted_llama()
    mlp = model.get_base_model().model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)).reshape(x.shape)
    return model


@granularities
@pytest.mark.parametrize(("statistic", "size"), [("mean", 3), ("squares", 1)])
def test_a_layer_with_flattened_samples_is_supported(granularity, statistic, size, samples):
    expected = laws.sums_by_the_loop(builders.adapted_llama(), samples, granularity, statistic, [])
    laws.sums_are(laws.swept(flattened_llama(), samples, granularity, statistic, [], size), expected, 1e-6)


def test_squares_of_a_layer_with_flattened_samples_need_batches_of_one(samples):
    model = flattened_llama()
    with laws.untouched(model), pytest.raises(UnsupportedLayerError, match=r"mlp.*expected an input of \[N, T, in\]"):
        laws.swept(model, samples, "factor", "squares", [], 2)


def test_the_progress_bar_can_be_silent(samples, capsys):
    model = builders.adapted_llama()
    for shown in (True, False):
        sweep(laws.job_of(model, {"forget": samples}, "factor", show_progress_bar=shown), "forget", 2)
        assert ("gradients on the forget set" in capsys.readouterr().err) is shown
