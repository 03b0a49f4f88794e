"""Rows and prompts that are longer than the model's table of positions."""

import builders
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_perta import ConfigError, DataError, InfluenceSettings, UnlearningSettings, erase_instances
from peft_perta.cli import main
from peft_perta.data import note
from peft_perta.evaluation import Subject, evaluate_split, generate
from peft_perta.model import base_model, row_length
from peft_perta.training import train_forget_adapter, train_unlearning

TOKENIZER = builders.tokenizer()
LONG = {"question": "Who?", "answer": "Ned. " * 60}  # 300 tokens
TEXT = {"text": "Ned. " * 60}
ROWS = [LONG, TEXT, *builders.forget_rows()]


@pytest.fixture(autouse=True)
def _notes():
    note.cache_clear()


def short_gpt2():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=builders.VOCABULARY, n_positions=128, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def adapted():
    return builders.with_adapters(short_gpt2(), builders.lora_config(builders.GPT2_PROJECTIONS, fan_in_fan_out=True))


def gptj():
    config = GPTJConfig(
        n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=128, rotary_dim=8, bos_token_id=1, eos_token_id=1
    )
    return GPTJForCausalLM(config)


def rotary(positions):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=128,
        max_position_embeddings=positions,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "default", "table"),
    [
        (short_gpt2, 128, 128),
        (adapted, 128, 128),
        (lambda: base_model(builders.adapted_opt()), 256, 256),
        (gptj, 128, 128),
        (lambda: rotary(64), 64, None),
        (lambda: rotary(4096), 1024, None),
    ],
    ids=["GPT-2", "with adapters", "OPT", "GPT-J", "rotary, short", "rotary, long"],
)
def test_the_default_is_at_most_the_models(make, default, table):
    model = make()
    assert row_length(model, None) == default
    assert row_length(model, default) == default
    if table is None:
        assert row_length(model, 8192) == 8192
        return
    with pytest.raises(ConfigError, match=f"max_length: expected at most {table}, .* found {table + 1}; longer rows"):
        row_length(model, table + 1)
    with torch.no_grad():
        model(input_ids=torch.ones(1, table, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, table + 1, dtype=torch.long))


def test_the_table_of_a_vision_tower_limits_no_text():
    model = rotary(256)
    model.vision_tower = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(256, 4)})
    assert row_length(model, 8192) == 8192


def forget(**settings):
    config = builders.lora_config(builders.GPT2_PROJECTIONS, fan_in_fan_out=True)
    train_forget_adapter(
        short_gpt2(), ROWS, TOKENIZER, lora_config=config, num_train_epochs=1, show_progress_bar=False, **settings
    )


def unlearn(**settings):
    assert builders.negate(adapted(), ROWS, [TEXT | {"text": "Ted. " * 60}], **settings).provenance


def train(**settings):
    config = builders.lora_config(builders.GPT2_PROJECTIONS, fan_in_fan_out=True)
    train_unlearning(
        short_gpt2(), ROWS, builders.retain_rows(), TOKENIZER, UnlearningSettings(), lora_config=config,
        num_train_epochs=1, show_progress_bar=False, **settings,
    )  # fmt: skip


def erase(**settings):
    model, rows = adapted(), [*ROWS, *builders.retain_rows()]
    builders.trained(model, "forget", [row for row in rows if row not in (LONG, TEXT)], steps=5)
    settings = InfluenceSettings(max_iterations=2, **settings)
    erase_instances(model, rows, [LONG], TOKENIZER, adapter_name="forget", settings=settings, show_progress_bar=False)


def judge(**settings):
    evaluate_split(Subject(adapted(), TOKENIZER, **settings), ROWS, is_forget=True, generated=1)


CALLS = {"forget": forget, "unlearn": unlearn, "train": train, "erase": erase, "evaluate": judge}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_longer_rows_are_cut_at_the_models_table_with_a_word(call, capsys):
    call()
    assert "those after the first 128 (max_length), are left out" in capsys.readouterr().err


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_length_beyond_the_table_is_refused_before_compute(call, monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "forward", lambda *_, **__: pytest.fail("it was computed"))
    monkeypatch.setattr(builders, "trained", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="max_length: expected at most 128, the number of positions"):
        call(max_length=129)


def test_an_answer_has_as_many_tokens_as_fit(capsys):
    subject = Subject(short_gpt2(), TOKENIZER, show_progress_bar=False)
    rows = [{"prompt": "x" * length, "completion": "y"} for length in (3, 120)]
    texts = generate(subject, rows, max_new_tokens=50)
    assert all(len(text) <= 8 for text in texts)
    said = "answers have at most 8 tokens instead of 50: the model's table has 128 positions, and the longest prompt"
    assert said in capsys.readouterr().err
    generate(subject, rows[:1], max_new_tokens=50)
    assert capsys.readouterr().err == ""


def test_a_prompt_that_leaves_no_room_is_refused():
    rows = [{"prompt": "x" * length, "completion": "y"} for length in (3, 128)]
    with pytest.raises(DataError, match="row 2: its prompt has 128 tokens, expected fewer than 128"):
        generate(Subject(short_gpt2(), TOKENIZER, show_progress_bar=False), rows)


def test_the_commands_take_the_models_length(tmp_path, capsys):
    short_gpt2().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "%s"}\n' % ("Ned. " * 60))
    command = ["forget", "--model", str(tmp_path / "base"), "--forget", str(tmp_path / "rows.jsonl"), "--epochs", "1"]
    assert main([*command, "--output", str(tmp_path / "adapter")]) == 0
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path / "adapter"), "--max-length", "1024"]) == 2
    assert "max_length: expected at most 128" in capsys.readouterr().err


@pytest.mark.parametrize("length", [-3, 0, 1, 2.5, True])
def test_a_length_that_cuts_rows_to_nothing_is_refused(length):
    with pytest.raises(ConfigError, match="max_length: expected an int from 2"):
        row_length(builders.llama(), length)
