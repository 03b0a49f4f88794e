"""The model is bit for bit as it was, after success and after an exception at every stage."""

import builders
import laws
import pytest
import tables
import torch

from peft_perta import PerTAConfig, add_perta_adapter, get_perta_state_dict
from peft_perta.model import preserved
from peft_perta.perta import GRANULARITIES, _description, _emission, edited_layers, layer

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
kinds = pytest.mark.parametrize("kind", tables.LAYERS)


class Stop(Exception):
    """Raised by a stage in these tests."""


def unlearn(model, call=get_perta_state_dict, **settings):
    return call(
        model,
        PerTAConfig(**settings),
        builders.forget_rows(),
        builders.retain_rows(),
        tokenizer=builders.tokenizer(),
        show_progress_bar=False,
    )


def awkward(model):
    """The model in an unusual state that careless code would not restore."""
    model.train()
    model.get_base_model().get_submodule("lm_head").eval()
    model.set_adapter("task")
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.is_floating_point():
            parameter.requires_grad_(index % 3 == 0)
            if "lora" in name and index % 2:
                parameter.grad = torch.ones_like(parameter)
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):  # bitsandbytes sets it at the first forward
            module.compute_dtype, module.compute_type_is_set = None, False
    model.register_forward_hook(lambda module, args, output: None)
    torch.rand(3)  # nor is the random generator in its initial state
    return model


@kinds
@pytest.mark.parametrize(
    "settings", [{"granularity": "factor"}, {"granularity": "delta", "weighting": "empirical-fisher"}]
)
def test_success_leaves_no_trace(kind, settings):
    model = awkward(tables.LAYERS[kind]())
    with laws.untouched(model):
        unlearn(model, **settings)


@kinds
def test_adapters_that_were_off_stay_off(kind):
    model = tables.LAYERS[kind]()
    model.base_model.disable_adapter_layers()
    with laws.untouched(model):
        unlearn(model, gradients_at="full")


def test_gradient_checkpointing_is_restored():
    model = awkward(builders.adapted_llama())
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with laws.untouched(model):
        unlearn(model)


STAGES = {
    "resolve_weighting": _description,
    "resolve_targets": _description,
    "ranks_of": _description,
    "load_samples": _description,
    "choose_plan": edited_layers,
    "gather": edited_layers,
    "weigh": layer,
    "_fit_of": layer,
    "build_adapter": _emission,
    "hash_targets": _emission,
    "PerTAProvenance": _emission,
}


@pytest.mark.parametrize("call", [get_perta_state_dict, add_perta_adapter])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["linear", "linear4bit"])
def test_an_exception_at_a_stage_leaves_no_trace(kind, stage, call, monkeypatch):
    model = awkward(tables.LAYERS[kind]())
    monkeypatch.setattr(STAGES[stage], stage, _raising)
    with laws.untouched(model), pytest.raises(Stop, match="on purpose"):
        unlearn(model, call)


def _raising(*args, **kwargs):
    raise Stop("on purpose")


@pytest.mark.parametrize("kind", ["linear", "linear4bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("place", ["forward", "second forward", "third forward", "loss", "backward", "statistic"])
def test_an_exception_within_the_sweep_leaves_no_trace(kind, checkpointing, place, monkeypatch):
    model = awkward(tables.LAYERS[kind]())
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) >= {"second forward": 2, "third forward": 3}.get(place, 1):
            raise Stop("on purpose")

    layer = model.get_base_model().model.layers[1]
    if "forward" in place:
        layer.register_forward_pre_hook(fail)
    elif place == "loss":
        monkeypatch.setattr("peft_perta.gradients.passes.sample_losses", fail)
    elif place == "backward":
        layer.register_full_backward_hook(fail)
    else:
        monkeypatch.setattr(type(GRANULARITIES["factor"]), "gradient", fail)
    with laws.untouched(model), pytest.raises(Stop, match="on purpose"):
        unlearn(model, batch_size=2)


def test_a_keyboard_interrupt_leaves_no_trace(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt("by hand")

    model = awkward(builders.adapted_llama())
    monkeypatch.setattr("peft_perta.gradients.passes.sample_losses", interrupt)
    with laws.untouched(model), pytest.raises(KeyboardInterrupt, match="by hand"):
        unlearn(model)


def test_an_exception_while_adding_leaves_no_trace(monkeypatch):
    model = awkward(builders.adapted_llama())

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr("peft_perta.adapters.build.set_peft_model_state_dict", fail)
    with laws.untouched(model), pytest.raises(ValueError, match="on purpose"):
        unlearn(model, add_perta_adapter)


@kinds
def test_within_the_block_the_model_is_frozen_and_in_eval_mode(kind):
    model = awkward(tables.LAYERS[kind]())
    with preserved(model, []):
        assert not any(p.requires_grad for p in model.parameters())
        in_training_mode = {type(m).__name__ for m in model.modules() if m.training}
        assert in_training_mode <= {"Linear4bit", "Linear8bitLt"}
        assert all(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))


def test_within_the_block_the_named_adapters_are_on():
    model = awkward(builders.adapted_llama())
    with preserved(model, ["forget", "task"]):
        assert all(m.active_adapters == ["forget", "task"] for m in model.modules() if hasattr(m, "lora_A"))


def test_nf4_weights_are_not_repacked():
    """bitsandbytes repacks weights in eval mode on some CPUs; a forward within the block must not."""
    model = builders.adapted_nf4_llama()
    with laws.untouched(model), preserved(model, []), torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_the_random_state_is_restored():
    model = builders.adapted_llama()
    with laws.untouched(model), preserved(model, []):
        torch.rand(5)
