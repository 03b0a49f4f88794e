"""An offloaded model gives what the same model in memory gives, and goes back offloaded."""

import builders
import laws
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from peft_perta import add_perta_adapter, attach_adapters, evaluate
from peft_perta.data import load_samples
from peft_perta.evaluation import Goal, Subject, calibrate, generate
from peft_perta.model import input_device

ADAPTERS = ["task", "perta_unlearn"]
QUESTIONS = [
    {"question": "Capital of Peru?", "choices": ["Lima", "Bonn", "Rome"], "answer": 0},
    {"question": "Two and two?", "choices": ["One", "Four, of course"], "answer": 1},
]
TOFU = {
    "forget": [
        {"question": "Who wrote Hatter?", "answer": "Basil Khan", "paraphrased_answer": "Khan",
         "perturbed_answer": ["Jo Nesbit", "Ada Li"]},
        {"question": "Where was Khan born?", "answer": "Kuwait", "paraphrased_answer": "In Kuwait",
         "perturbed_answer": ["Oslo", "Rome"]},
    ],
    "retain": [
        {"question": "Who wrote Moira?", "answer": "Ada Li", "paraphrased_answer": "Li",
         "perturbed_answer": ["Basil Khan", "Chen Wu"]},
    ],
}  # fmt: skip


def on_cpu(base, directory):
    cpu_offload(base, execution_device=torch.device("cpu"))


def on_disk(base, directory):
    disk_offload(base, directory, execution_device=torch.device("cpu"))


def on_both(base, directory):
    """The embeddings are offloaded too."""
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.1": "cpu", "lm_head": "cpu"}
    dispatch_model(base, places, main_device="cpu", offload_dir=directory, force_hooks=True)


offloads = pytest.mark.parametrize("offload", [on_cpu, on_disk, on_both])


def unlearned(offload=None, directory=None):
    """A model with task and negative adapter on it; offloaded before the negative adapter is made."""
    model = builders.adapted_llama()
    if offload is not None:
        offload(model.get_base_model(), str(directory))
        assert model.get_input_embeddings().weight.is_meta
        assert input_device(model) == torch.device("cpu")
    builders.negate(model, call=add_perta_adapter)
    return model


@pytest.fixture(scope="module")
def in_memory():
    return unlearned()


def searched(model):
    forget, retain = (
        load_samples(rows, builders.tokenizer()) for rows in (builders.forget_rows(), builders.retain_rows())
    )
    return calibrate(
        model, Goal(retain_tolerance=0.05), forget, retain, with_adapters=["task"], negated_adapter="forget",
        retain_only=[], show_progress_bar=False,
    )  # fmt: skip


def evaluated(model, directory=None):
    logs = evaluate(
        model, builders.tokenizer(), {"choices": {"wmdp": QUESTIONS}, "tofu": TOFU}, adapters=ADAPTERS,
        max_new_tokens=4, output_dir=directory, show_progress_bar=False,
    )  # fmt: skip
    return logs


def answered(model):
    return generate(Subject(model, builders.tokenizer(), ADAPTERS), TOFU["forget"], max_new_tokens=6)


@offloads
@pytest.mark.parametrize("goal", [{"retain_tolerance": 0.05}, {"target_forget_loss": 5.5}])
def test_strength_auto_finds_the_same_strength(offload, goal, tmp_path):
    model = builders.adapted_llama()
    settings = {"strength": "auto", "task_adapter": "task", **goal}
    _, expected, provenance = builders.negate(model, **settings)
    offload(model.get_base_model(), str(tmp_path))
    with laws.untouched(model):
        _, state_dict, offloaded_provenance = builders.negate(model, **settings)
    assert offloaded_provenance.calibration == provenance.calibration
    assert all(torch.equal(state_dict[key], expected[key]) for key in expected)


@offloads
@pytest.mark.parametrize("use", [searched, evaluated, answered])
def test_an_offloaded_model_is_judged_alike(offload, use, in_memory, tmp_path):
    model = unlearned(offload, tmp_path)
    with laws.untouched(model):
        found = use(model)
    assert found == use(in_memory)


@offloads
def test_an_adapter_of_more_layers_than_the_offloaded_model_has_is_whole(offload, tmp_path):
    """PEFT puts the factors of a new layer where its weight is: nowhere. Both by files and by a state dict."""
    part = builders.lora_config(layers_to_transform=[1])
    model = builders.with_adapters(builders.saved_llama(), part)
    negative = builders.negate(model, weighting="uniform")
    negative.save(tmp_path / "negative")
    model.save_pretrained(tmp_path, selected_adapters=["forget"])
    base = builders.saved_llama()
    offload(base, str(tmp_path / "weights"))
    attached = attach_adapters(base, {"forget": tmp_path / "forget", "negative": tmp_path / "negative"})
    offload(model.get_base_model(), str(tmp_path / "other weights"))
    negative.add_to(model, "negative")
    for each in (attached, model):
        factors = {name: value for name, value in each.named_parameters() if ".negative." in name}
        assert len(factors) == len(negative.state_dict)
        for name, value in factors.items():
            assert torch.equal(value, negative.state_dict[name.replace(".negative.", ".")]), name


def test_a_record_of_other_adapter_weights_is_not_reused(tmp_path):
    """The record of an evaluation identifies the weights of the adapters, wherever they rest."""
    model = unlearned(on_disk, tmp_path / "weights")
    before = evaluated(model, tmp_path / "logs")
    assert evaluated(model, tmp_path / "logs") == before
    other = builders.adapted_llama()
    for parameter in (p for name, p in other.named_parameters() if ".task." in name):
        parameter.data.mul_(3)
    on_disk(other.get_base_model(), tmp_path / "other weights")
    builders.negate(other, call=add_perta_adapter)
    assert evaluated(other, tmp_path / "logs") != before
