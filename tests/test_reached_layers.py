"""What a forward pass does to tapped layers in real families: it modifies their outputs, runs them twice, or never."""

import builders
import family_models
import laws
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_perta import (
    ConfigError,
    NumericalError,
    PerTAConfig,
    UnsupportedLayerError,
    erase_instances,
    get_perta_state_dict,
    train_forget_adapter,
)
from peft_perta.data import load_samples, note
from peft_perta.gradients._taps import _LayerTap

IN_PLACE = {  # family -> layers whose output the model then modifies in place, and others beside them
    "Falcon (7B's layout)": ["dense", "dense_4h_to_h"],
    "Falcon (40B's layout)": ["dense", "dense_4h_to_h"],
    "Llama-4": ["shared_expert.down_proj", "o_proj"],
    "Gemma3n": ["prediction_coefs", "correction_coefs", "linear_right", "down_proj"],
}
UNREACHED = {  # family -> a layer that rows of text never reach
    "Gemma3 for images": "model.vision_tower.encoder.layers.0.mlp.fc1",
    "Qwen2-VL": "model.visual.blocks.0.attn.proj",
    "LLaVA": "model.multi_modal_projector.linear_1",
    "Jamba": "model.layers.0.mamba.dt_proj",
}
EXCLUDED = {"Jamba": ["router", "out_proj"]}


@pytest.fixture(scope="module")
def samples():
    return load_samples(builders.forget_rows()[:3], builders.tokenizer())


def with_forget_adapter(family: str, targets: list[str] | str, **settings) -> PeftModel:
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(family_models.BUILDERS[family](), config, adapter_name="forget").eval()


@pytest.mark.parametrize("family", IN_PLACE)
@pytest.mark.parametrize("statistic", ["mean", "squares"])
def test_outputs_modified_in_place_give_exact_gradients(family, statistic, samples):
    model = with_forget_adapter(family, IN_PLACE[family])
    size = 1 if statistic == "squares" else 2
    with laws.untouched(model):
        laws.hooks_equal_the_loop(model, samples, "delta", statistic, [], 1e-5, size)


@pytest.mark.parametrize("reentrant", [True, False])
def test_outputs_modified_in_place_may_be_recomputed(reentrant, samples):
    model = with_forget_adapter("Falcon (7B's layout)", ["dense", "dense_4h_to_h"])
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    laws.hooks_equal_the_loop(model, samples, "delta", "mean", [], 1e-5)


def test_the_gradients_of_a_layer_that_runs_twice_are_added(samples):
    model = with_forget_adapter("Gemma3n", ["modality_router"])
    laws.hooks_equal_the_loop(model, samples, "delta", "mean", [], 1e-5)


def test_squares_of_a_layer_that_runs_twice_are_refused_by_name(samples):
    model = with_forget_adapter("Gemma3n", ["modality_router"])
    with (
        laws.untouched(model),
        pytest.raises(UnsupportedLayerError, match=r"altup\.modality_router runs several times.*weighting='grad'"),
    ):
        laws.swept(model, samples, "delta", "squares", [], 1)


def zeroed(model: PeftModel, family: str) -> list[str]:
    """Set B of the layers that the rows do not reach to 0, where training would have left it."""
    unreached = []
    for path, module in model.get_base_model().named_modules():
        passed_by = any(part in path for part in ("vision", "visual", "multi_modal_projector", "dt_proj"))
        if passed_by and "forget" in getattr(module, "lora_B", {}):
            module.lora_B["forget"].weight.data.zero_()
            unreached.append(path)
    return unreached


@pytest.mark.parametrize("family", UNREACHED)
def test_layers_that_the_rows_never_reach_are_left_out_with_a_word(family, capsys):
    model = with_forget_adapter(family, "all-linear", exclude_modules=EXCLUDED.get(family))
    unreached = zeroed(model, family)
    assert UNREACHED[family] in unreached
    note.cache_clear()  # a line is said once in a process
    rows = builders.forget_rows()
    with laws.untouched(model):
        emitted = get_perta_state_dict(
            model, PerTAConfig(), rows[:3], rows[3:], tokenizer=builders.tokenizer(), show_progress_bar=False
        )
    assert f"{len(unreached)} weights are left as they are" in capsys.readouterr().err
    changed = {name for name, delta in laws.deltas_of(emitted.state_dict).items() if bool(delta.any())}
    assert changed
    assert not changed & set(unreached)
    emitted.add_to(model, "negative")  # PEFT finds every layer, and only layers that exist
    adapted = {
        path for path, module in model.get_base_model().named_modules() if "negative" in getattr(module, "lora_A", {})
    }
    assert adapted == set(laws.deltas_of(emitted.state_dict))
    assert not any("vision" in path or "visual" in path for path in adapted)


def test_a_layer_that_changed_and_has_no_gradient_is_an_error():
    model = with_forget_adapter("LLaVA", "all-linear")
    rows = builders.forget_rows()
    with laws.untouched(model), pytest.raises(NumericalError, match="does not contribute to the loss"):
        get_perta_state_dict(
            model, PerTAConfig(), rows[:3], rows[3:], tokenizer=builders.tokenizer(), show_progress_bar=False
        )


def test_training_leaves_the_layers_that_the_rows_never_reach_as_they_are(tmp_path):
    """B = 0 there is not assumed: it is what the forget adapter's training gives."""
    rows, tokenizer = builders.forget_rows(), builders.tokenizer()
    model = train_forget_adapter(
        family_models.llava(), rows[:3], tokenizer, tmp_path / "forget", num_train_epochs=2, show_progress_bar=False,
    )  # fmt: skip
    emitted = get_perta_state_dict(
        model, PerTAConfig(), rows[:3], rows[3:], tokenizer=tokenizer, show_progress_bar=False
    )
    assert all(".language_model." in key for key in emitted.state_dict)


def test_an_encoder_decoder_is_refused_by_the_functions_too(tmp_path):
    rows, tokenizer = builders.forget_rows(), builders.tokenizer()
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder"):
        train_forget_adapter(family_models.BUILDERS["T5"](), rows[:3], tokenizer, tmp_path / "forget")
    model = with_forget_adapter("T5", ["q", "v"])
    with laws.untouched(model), pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder"):
        get_perta_state_dict(model, PerTAConfig(), rows[:3], rows[3:], tokenizer=tokenizer)


def test_a_saved_output_that_is_modified_in_place_is_detected():
    """The tap shares the output's memory and its version: autograd must see the change, as without a tap."""
    weight = torch.ones(3, requires_grad=True)
    tapped = _LayerTap.apply(weight.exp(), weight.detach(), torch.zeros((), requires_grad=True), lambda *_: None)
    tapped += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tapped.sum().backward()


@pytest.mark.parametrize("family", UNREACHED)
def test_rows_are_erased_from_an_adapter_with_such_layers(family):
    rows, tokenizer = builders.forget_rows(), builders.tokenizer()
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=EXCLUDED.get(family))
    model = train_forget_adapter(
        family_models.BUILDERS[family](), rows, tokenizer, lora_config=config, num_train_epochs=2, learning_rate=0.01,
        show_progress_bar=False,
    )  # fmt: skip
    with laws.untouched(model):
        result = erase_instances(model, rows, rows[:1], tokenizer, adapter_name="forget", show_progress_bar=False)
    changed = {name for name, delta in laws.deltas_of(result.difference().state_dict).items() if bool(delta.any())}
    assert changed
    assert UNREACHED[family] not in changed
