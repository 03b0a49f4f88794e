"""``UnlearningSettings`` beside TrainingArguments in the parsers of transformers and TRL, from flags and YAML."""

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig, TrlParser, get_peft_config

from peft_perta import ConfigError, UnlearningSettings
from peft_perta.job import recipe

KINDS = (UnlearningSettings, TrainingArguments, ModelConfig)
FLAGS = ["--forget_loss", "dpo", "--retain-budget", "0.5", "--refusals", "No.", "I do not know.", "--layer", "2"]
YAML = "forget_loss: dpo\nretain_budget: 0.5\nretain_loss: embed-diff\nlayer: 2\nrefusals: [No., I do not know.]\n"
EXPECTED = UnlearningSettings(
    "dpo", retain_loss="embed-diff", retain_budget=0.5, layer=2, refusals=["No.", "I do not know."]
)


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_flags_become_settings(parser, tmp_path):
    given = [*FLAGS, "--retain_loss", "embed-diff", "--output_dir", str(tmp_path), "--eval_steps", "3"]
    settings, arguments, _ = parser(KINDS).parse_args_into_dataclasses(given)
    assert settings == EXPECTED
    assert arguments.eval_steps == 3


def test_yaml_becomes_settings_and_a_flag_goes_before_it(tmp_path):
    (tmp_path / "config.yaml").write_text(f"{YAML}output_dir: {tmp_path}\nuse_peft: true\nlora_r: 4\nbeta: 2e-1\n")
    given = ["--config", str(tmp_path / "config.yaml"), "--retain_budget", "0.7"]
    settings, _, of_model = TrlParser(KINDS).parse_args_and_config(given)
    assert settings.to_dict() == {**EXPECTED.to_dict(), "beta": 0.2, "retain_budget": 0.7}
    assert get_peft_config(of_model).r == 4


@pytest.mark.parametrize("read", [HfArgumentParser.parse_json_file, HfArgumentParser.parse_dict])
def test_the_other_doors_of_the_parser(read, tmp_path):
    values = {"forget_loss": "simnpo", "margin": 0.5, "output_dir": str(tmp_path)}
    (tmp_path / "config.json").write_text(str(values).replace("'", '"'))
    given = values if read is HfArgumentParser.parse_dict else tmp_path / "config.json"
    assert read(HfArgumentParser(KINDS[:2]), given)[0] == UnlearningSettings("simnpo", margin=0.5)


def test_the_defaults_are_the_settings_defaults_and_the_help_is_shown(tmp_path):
    parser = HfArgumentParser(KINDS)
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])[0] == UnlearningSettings()
    assert "the mean cross-entropy on the held-out retain rows" in " ".join(parser.format_help().split())


def test_a_bad_value_is_told_as_always(tmp_path):
    given = ["--output_dir", str(tmp_path), "--retain_tolerance", "-1"]
    with pytest.raises(ConfigError, match="retain_tolerance: expected a number > 0, found -1"):
        HfArgumentParser(KINDS).parse_args_into_dataclasses(given)
    with pytest.raises(SystemExit, match="2"):
        HfArgumentParser(KINDS).parse_args_into_dataclasses([*given[:2], "--forget_loss", "npoo"])


def test_a_parser_leaves_recipes_readable():
    """It narrows the types of the fields, in place: a recipe's ``null`` would be refused."""
    HfArgumentParser(KINDS)
    recipe._adapter.cache_clear()
    read = recipe.recipe_of({"train": {"target_forget_loss": None, "beta": None, "refusals": None}})
    assert read.train is not None
    assert read.train.target_forget_loss is None
