"""A forget adapter is trained on the completions, on the origin model; adapters that cannot be negated are refused."""

import random
from contextlib import nullcontext

import builders
import family_models
import laws
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import TrainingArguments, get_scheduler
from trl import SFTTrainer

from peft_perta import (
    AdapterError,
    ConfigError,
    DataError,
    NumericalError,
    OutputError,
    PerTAConfig,
    UnsupportedLayerError,
    attach_adapters,
    get_perta_state_dict,
    train_forget_adapter,
)
from peft_perta.data import batches, load_samples
from peft_perta.model import sample_losses
from peft_perta.training._training_arguments import check_warmup

ROWS, TOKENIZER = builders.forget_rows(), builders.tokenizer()
SETTINGS = {"num_train_epochs": 6, "learning_rate": 5e-3, "show_progress_bar": False, "logging_strategy": "no"}
bases = pytest.mark.parametrize("base", [builders.saved_llama, builders.nf4_llama], ids=["float", "nf4"])


def loss(model):
    with torch.no_grad():
        (batch,) = batches(load_samples(ROWS, TOKENIZER), len(ROWS))
        return float(sample_losses(model, batch).mean())


def train(model, output_dir=None, **settings):
    return train_forget_adapter(model, ROWS, TOKENIZER, output_dir, **{**SETTINGS, **settings})


@bases
def test_the_forget_set_is_learned_and_the_adapter_can_be_negated(base, tmp_path):
    before = loss(base())
    model = train(base(), tmp_path / "forget")
    assert isinstance(model, PeftModel)
    assert loss(model) < before - 0.5
    assert sorted(f.name for f in (tmp_path / "forget").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "perta_forget.json",
    ]
    loaded = attach_adapters(base(), {"forget": tmp_path / "forget"})
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, trained.pop(name).float())
    assert not trained
    _, state_dict, _ = get_perta_state_dict(loaded, PerTAConfig(weighting="uniform"))
    assert any(value.any() for value in state_dict.values())


def test_experts_are_trained_and_can_be_negated(tmp_path):
    before = loss(builders.mixtral())
    model = train(builders.mixtral(), tmp_path / "forget", lora_config=builders.experts_config(), learning_rate=2e-2)
    assert loss(model) < before - 0.5
    loaded = attach_adapters(builders.mixtral(), {"forget": tmp_path / "forget"})
    _, state_dict, provenance = get_perta_state_dict(loaded, PerTAConfig(weighting="uniform"))
    assert {layer.kind for layer in provenance.layers} == {"experts"}
    assert all(value.any() for value in state_dict.values())


@pytest.mark.parametrize("family", ["GraniteMoE", "Mixtral", "GPT-OSS"])
def test_a_mixture_learns_the_completions_alone(family):
    """TRL would add the loss that balances the experts' load, and fail on GraniteMoE, whose config names them so."""
    build = family_models.BUILDERS[family]
    model = build()
    before = loss(model)
    coefficient = model.config.router_aux_loss_coef
    trained = train(model, num_train_epochs=2)
    assert loss(trained) < before
    assert trained.config.router_aux_loss_coef == coefficient
    without = train(build(), num_train_epochs=2, router_aux_loss_coef=0.0)
    for (name, found), (_, expected) in zip(trained.named_parameters(), without.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


@bases
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": False}])
def test_success_adds_a_frozen_active_adapter_and_nothing_else(base, settings):
    model = base()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bare = laws.snapshot(model)
    trained = train(model, num_train_epochs=1, **settings)
    assert trained.active_adapter == "forget"
    assert not any(p.requires_grad for p in trained.parameters())
    assert not any(m.training for m in trained.modules())
    left = laws.snapshot(trained.unload())
    changed = {key for key in {*bare, *left} if bare.get(key) != left.get(key)}
    assert not changed


def test_the_tokenizer_stays_as_it_was():
    tokenizer = builders.tokenizer()
    tokenizer.pad_token = None
    train_forget_adapter(builders.saved_llama(), ROWS, tokenizer, **{**SETTINGS, "num_train_epochs": 1})
    assert tokenizer.pad_token is None


def test_the_same_seed_trains_the_same_adapter():
    first, second, other = (
        {n: p.clone() for n, p in train(builders.saved_llama(), num_train_epochs=1, seed=s).named_parameters()}
        for s in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_other_adapters_are_off_and_untouched_while_it_trains():
    """The weights of a task adapter stay, and training does not depend on them."""
    task = builders.with_adapters(builders.saved_llama(), builders.lora_config(r=2))
    task_weights = {n: p.clone() for n, p in task.named_parameters() if ".forget." in n}
    both = train(task, adapter_name="new", num_train_epochs=2)
    assert all(torch.equal(p, task_weights[n]) for n, p in both.named_parameters() if ".forget." in n)
    alone = train(builders.saved_llama(), adapter_name="new", num_train_epochs=2)
    beside_task = {n: p for n, p in both.named_parameters() if ".new." in n}
    assert beside_task.keys() == {n for n, p in alone.named_parameters() if ".new." in n}
    assert all(torch.equal(p, beside_task[n]) for n, p in alone.named_parameters() if ".new." in n)
    assert both.active_adapters == ["new"]


def test_only_completions_are_learned(monkeypatch):
    """The trainer sees the same tokens and labels as the gradient engine."""
    seen = []
    compute = SFTTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen.extend(zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", spy)
    train(builders.saved_llama(), num_train_epochs=1)
    expected = {(tuple(s.input_ids.tolist()), tuple(s.labels.tolist())) for s in load_samples(ROWS, TOKENIZER)}
    trained_on = set()
    for ids, labels in seen:
        size = max(i for i, label in enumerate(labels) if label != -100) + 1
        assert set(labels[size:]) <= {-100}
        trained_on.add((tuple(ids[:size]), tuple(labels[:size])))
    assert trained_on == expected


class Stop(Exception):
    """Raised by a stage on purpose."""


@pytest.mark.parametrize("stage", ["get_peft_model", "resolve_layers", "SFTTrainer", "training", "after training"])
@pytest.mark.parametrize(
    ("base", "config"),
    [
        (builders.saved_llama, None),
        (builders.nf4_llama, None),
        (builders.adapted_saved_llama, None),
        (builders.mixtral, builders.experts_config()),
        (builders.adapted_mixtral, builders.experts_config()),
    ],
    ids=["float", "nf4", "adapted", "experts", "adapted experts"],
)
def test_an_exception_leaves_the_model_as_it_was(base, config, stage, monkeypatch):
    model = base().train()
    if isinstance(model, PeftModel):
        model.set_adapter("task")
    trained = SFTTrainer.train

    def fail(*args, **kwargs):
        raise Stop("on purpose")

    def train_and_fail(self):
        trained(self)
        raise Stop("on purpose")

    if stage == "training":
        monkeypatch.setattr(SFTTrainer, "compute_loss", fail)
    elif stage == "after training":
        monkeypatch.setattr(SFTTrainer, "train", train_and_fail)
    elif stage == "get_peft_model" and isinstance(model, PeftModel):
        monkeypatch.setattr(PeftModel, "add_adapter", fail)
    else:
        module = "new_adapter" if stage == "get_peft_model" else "forget_adapter"
        monkeypatch.setattr(f"peft_perta.training.{module}.{stage}", fail)
    with laws.untouched(model), pytest.raises(Stop, match="on purpose"):
        train(model, adapter_name="new", lora_config=config, num_train_epochs=1, gradient_checkpointing=True)


@pytest.fixture
def _no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("bad input must be refused before training")

    monkeypatch.setattr("peft_perta.training.forget_adapter.SFTTrainer", fail)


REFUSED = {
    "DoRA": ({"use_dora": True}, AdapterError, "LoRA variant .use_dora"),
    "bias": ({"bias": "all"}, AdapterError, "trains biases"),
    "lora_bias": ({"lora_bias": True}, AdapterError, "trains biases"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, AdapterError, "saves whole modules"),
    "tokens": ({"trainable_token_indices": [1]}, AdapterError, "trains token embeddings"),
    "init": ({"init_lora_weights": "pissa"}, AdapterError, "rewrites the base weights"),
    "embedding": ({"target_modules": ["embed_tokens"]}, UnsupportedLayerError, "Embedding layer cannot be edited"),
}


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_cannot_be_negated_are_refused_before_training(changes, error, message, tmp_path):
    config = LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})
    model = builders.saved_llama()
    with laws.untouched(model), pytest.raises(error, match=message):
        train(model, tmp_path / "out", lora_config=config)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_training")
def test_a_tied_head_is_refused_before_training():
    model = builders.llama(tied=True)
    config = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with laws.untouched(model), pytest.raises(UnsupportedLayerError, match="lm_head shares its weight"):
        train(model, lora_config=config)


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"adapter_name": "a.b"}, AdapterError, "without dots"),
        ({"packing": True}, ConfigError, "'packing' is set by train_forget_adapter itself"),
        ({"learning_rat": 1}, ConfigError, "learning_rat.*expected fields of trl.SFTConfig"),
        ({"max_length": 3}, DataError, "no token of the completion is left"),
        (
            {"num_train_epochs": 1, "per_device_train_batch_size": 8, "warmup_steps": 0.1},
            ConfigError,
            "warmup_steps: expected 0 where training is a single step, found 0.1",
        ),
    ],
)
def test_bad_settings_are_refused_before_training(settings, error, message):
    model = builders.saved_llama()
    with laws.untouched(model), pytest.raises(error, match=message):
        train(model, **settings)


@pytest.mark.usefixtures("_no_training")
def test_a_taken_name_is_refused_before_training():
    model = builders.adapted_saved_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match="'task' is on the model already"):
        train(model, adapter_name="task")


@pytest.mark.usefixtures("_no_training")
def test_an_output_that_is_not_ours_is_refused_before_training(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="was not written by peft_perta"):
        train(builders.saved_llama(), tmp_path)


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize("rows", [[], [{"prompt": "x", "completion": ""}]])
def test_bad_rows_are_refused_before_training(rows):
    with pytest.raises(DataError, match="the forget set"):
        train_forget_adapter(builders.saved_llama(), rows, TOKENIZER, **SETTINGS)


@pytest.mark.usefixtures("_no_training")
def test_a_tokenizer_without_eos_is_refused_before_training():
    tokenizer = builders.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        train_forget_adapter(builders.saved_llama(), ROWS, tokenizer, **SETTINGS)


def test_the_users_lora_config_and_random_states_are_unchanged():
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    before, state = config.to_dict(), (random.getstate(), torch.get_rng_state())
    train(builders.saved_llama(), lora_config=config, num_train_epochs=1)
    assert config.to_dict() == before
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize(
    ("rate", "error", "message"), [(0.0, AdapterError, "is untrained"), (1e40, NumericalError, "holds NaN or infinite")]
)
def test_training_that_learned_nothing_or_diverged_is_refused_and_leaves_nothing(tmp_path, rate, error, message):
    model = builders.saved_llama()
    with laws.untouched(model), pytest.raises(error, match=message):
        train(model, tmp_path / "out", num_train_epochs=1, learning_rate=rate, max_grad_norm=0.0, warmup_steps=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "reduce_lr_on_plateau"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_single_step_is_refused_where_its_learning_rate_would_be_zero(name, steps, tmp_path):
    """The oracle is transformers' own schedule."""
    settings = {"lr_scheduler_type": name, "warmup_steps": 2, "num_train_epochs": steps}
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, use_cpu=True, eval_strategy="epoch", **settings
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=steps)
    idle = steps == 1 and optimizer.param_groups[0]["lr"] == 0
    with pytest.raises(ConfigError, match="warmup_steps: expected 0") if idle else nullcontext():
        check_warmup(arguments, 4)
