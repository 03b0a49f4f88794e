"""Every setting: documented, checked, and unchanged by a round trip through JSON."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_perta import ConfigError, PerTAConfig
from peft_perta.adapters import DTYPES, SERVABLE_RANKS, servable_rank
from peft_perta.perta import FITS, GRANULARITIES, gradient_job

FIELDS = [field.name for field in dataclasses.fields(PerTAConfig)]


@pytest.mark.parametrize("field", dataclasses.fields(PerTAConfig), ids=FIELDS)
def test_every_field_has_help(field):
    assert len(field.metadata["help"]) > 20
    assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize("field", dataclasses.fields(PerTAConfig), ids=FIELDS)
def test_the_docstring_explains_every_field_with_its_range_and_default(field):
    text = " ".join(PerTAConfig.__doc__.split())
    choices = f" One of {', '.join(map(repr, field.metadata['choices']))}." if field.metadata["choices"] else ""
    if not choices:
        assert field.metadata["help"].endswith(f" Expects {field.metadata['expected']}.")
    said = f"{field.name}: {field.metadata['help']}{choices} Default: {field.default!r}."
    assert " ".join(said.split()) in text


def test_names_to_choose_from_are_the_tables_own():
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(PerTAConfig)}
    assert {name: named for name, named in choices.items() if named} == {
        "granularity": tuple(GRANULARITIES),
        "fit": tuple(FITS),
        "allocation": ("uniform", "padded", "pattern"),
        "gradients_at": ("origin", "full"),
        "dtype": DTYPES,
    }


@pytest.mark.parametrize("fit", [None, *FITS])
@pytest.mark.parametrize("input_directions", [None, True, False])
def test_an_edit_needs_seven_more_copies_unless_it_is_only_truncated(fit, input_directions):
    config = PerTAConfig(fit=fit, input_directions=input_directions)
    copies = gradient_job(config, "mean", None, [], {}).edit_copies
    assert copies == (0 if input_directions is False and fit in (None, "truncated") else 7)


def test_the_defaults_are_what_measured_best():
    """docs/results.md: per factor, at the forget adapter's own rank."""
    config = PerTAConfig()
    assert (config.granularity, config.weighting, config.rank, config.strength) == ("factor", "grad", None, 1.0)


NUMBERS = (True, "1", None)
BAD = {
    "weighting": ("", 3, None),
    "granularity": ("neuron", None, "Factor"),
    "power": (-0.1, math.nan, math.inf, True, "1"),
    "rank": (0, 257, -1, 0.0, 1.0, 1.5, math.nan, True, "8"),
    "strength": (math.nan, math.inf, *NUMBERS, "most"),
    "target_forget_loss": (0, -1.0, math.inf, "auto", True),
    "retain_tolerance": (0, -0.1, math.nan, None, True),
    "gradients_at": ("both", None),
    "max_samples": (0, -1, 1.5, True),
    "input_directions": (1, "yes"),
    "fit_kl_samples": (-1, 1.5, None, True),
    "fit": ("svd", 1),
    "allocation": ("greedy", None),
    "seed": (1.5, -1, 2**70, *NUMBERS),
    "batch_size": (0, -2, 2.5, *NUMBERS),
    "max_memory": ("much", "0GiB", 0, -1, 1.5, True),
    "host_memory": ("10 apples", "-1GB", 0, False),
    "max_length": (1, 0, 2.5, True, "1"),
    "dtype": ("float64", "bf16", None),
}
GOOD = {
    "weighting": ("grad", "my.module:function"),
    "granularity": ("delta", "factor", "separable", "factor+delta"),
    "power": (None, 0, 0.5, 64),
    "rank": (None, 1, 256, 0.01, 0.999),
    "strength": (0, -1.5, 40.0, "auto"),
    "target_forget_loss": (None, 3.9, 4),
    "retain_tolerance": (0.05, 1),
    "gradients_at": ("origin", "full"),
    "max_samples": (None, 1),
    "input_directions": (None, True, False),
    "fit_kl_samples": (0, 32),
    "fit": (None, "truncated", "kronecker", "second-moment", "weighted"),
    "allocation": ("uniform", "padded", "pattern"),
    "seed": (0, 2**63 - 1),
    "batch_size": (1,),
    "max_memory": (None, "10GiB", "1.5 GB", 10**10),
    "host_memory": (None, "24GiB", 1),
    "max_length": (2, None),
    "dtype": ("float32", "bfloat16", "float16"),
}


def test_every_field_has_good_and_bad_values():
    assert set(BAD) == set(GOOD) == set(FIELDS)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: expected .*, found"):
        PerTAConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GOOD.items() for value in values])
def test_a_good_value_survives_a_round_trip(field, value, tmp_path):
    config = PerTAConfig(**{field: value})
    config.save_pretrained(tmp_path / "deep")
    loaded = PerTAConfig.from_pretrained(tmp_path / "deep")
    assert loaded == config
    assert type(getattr(loaded, field)) is type(value)


def test_the_file_is_plain_json(tmp_path):
    PerTAConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "perta_config.json").read_text()) == PerTAConfig().to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no such file"),
        ("{", "is not JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ('{"ranks": 8}', "no field 'ranks'"),
        ('{"rank": 0}', "^rank: expected"),
    ],
)
def test_a_bad_file_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "perta_config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        PerTAConfig.from_pretrained(tmp_path)


@given(rank=st.integers(1, 256))
def test_a_servable_rank_is_the_smallest_that_holds_the_rank(rank):
    found = servable_rank(rank)
    assert found in SERVABLE_RANKS
    assert found >= rank
    assert all(other < rank for other in SERVABLE_RANKS if other < found)


def test_no_server_takes_a_larger_rank():
    with pytest.raises(ConfigError, match="would need rank 257, expected at most 256"):
        servable_rank(257)
