"""A refused run leaves nothing, and nothing that it could have left is in the way of the corrected one."""

import collections
import json

import builders
import pytest
import torch

from peft_perta import ConfigError, DataError, NumericalError, OutputError
from peft_perta.cli import main
from peft_perta.comparison import ComparisonSettings
from peft_perta.comparison._results import Results
from peft_perta.data import claimed_directory
from peft_perta.gradients import Checkpoint

RUN = {"format": 1, "model": "abc"}
TENSORS = {("x",): torch.ones(1)}
GOAL = {"strength": "auto", "max_samples": 4, "task_adapter": "task"}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def backwards(monkeypatch):
    count, backward = collections.Counter(), torch.Tensor.backward

    def counted(tensor, *args, **kwargs):
        count["all"] += 1
        return backward(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    return count


@pytest.mark.parametrize("entries", [[], ["plan"]], ids=["description", "description and plan"])
def test_a_checkpoint_that_computed_nothing_is_no_obstacle(entries, tmp_path):
    old = Checkpoint(tmp_path, RUN)
    old.start()
    for entry in entries:
        old.save(entry, TENSORS, {"of": "the old run"})
    new = Checkpoint(tmp_path, {**RUN, "model": "def"})
    assert (new.load("plan"), new.names()) == (None, [])
    new.save("a", TENSORS, {})
    assert names(tmp_path) == ["a.safetensors", "lock", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "def"
    with pytest.raises(OutputError, match="is the checkpoint of another run, which differs in: model"):
        Checkpoint(tmp_path, RUN)


def test_a_checkpoint_is_opened_without_writing(tmp_path):
    Checkpoint(tmp_path / "c", RUN)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", ["{}", '{"epochs": 3}'])
def test_a_description_that_is_not_ours_is_left_alone(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputError, match="is the checkpoint of another run"):
        Checkpoint(tmp_path, RUN)
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"granularity": "delta", "host_memory": "1MiB"}, ConfigError),
        ({"retain": builders.forget_rows()[:1]}, DataError),
        ({**GOAL, "target_forget_loss": 1e-3}, NumericalError),
    ],
    ids=["memory", "a shared row", "a goal below the start"],
)
def test_a_run_that_is_refused_leaves_nothing(settings, error, backwards, tmp_path):
    with pytest.raises(error):
        builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c", **settings)
    assert backwards["all"] == 0
    assert names(tmp_path) == []
    builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c", granularity="factor")


def test_an_unreachable_goal_wastes_no_layer(backwards, tmp_path):
    """No strength reaches it, as only a search can tell; the run with another goal takes the layers as they are."""
    settings = {**GOAL, "checkpoint_dir": tmp_path / "c"}
    with pytest.raises(NumericalError, match="no strength up to 256"):
        builders.negate(builders.adapted_llama(), **settings, target_forget_loss=1e6)
    assert backwards["all"] > 0
    backwards.clear()
    resumed = builders.negate(builders.adapted_llama(), **settings, retain_tolerance=0.3)
    assert backwards["all"] == 0
    whole = builders.negate(builders.adapted_llama(), **GOAL, retain_tolerance=0.3)
    assert all(torch.equal(resumed.state_dict[key], value) for key, value in whole.state_dict.items())
    assert resumed.provenance.config == whole.provenance.config


def test_a_comparison_without_results_is_no_obstacle(tmp_path):
    Results(tmp_path, ComparisonSettings(rank=8), "one model")
    assert Results(tmp_path, ComparisonSettings(rank=4), "another model").all() == []


def test_a_directory_is_claimed_only_once_something_is_in_it(tmp_path):
    def write_then_fail(place):
        with claimed_directory(place, "marker", "x"):
            (place / "log").write_text("x")
            raise DataError("refused later")

    (tmp_path / "empty").mkdir()
    for place in ("new", "empty"):
        with pytest.raises(DataError), claimed_directory(tmp_path / place, "marker", "x"):
            raise DataError("refused")
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []
    with pytest.raises(DataError):
        write_then_fail(tmp_path / "new")
    assert names(tmp_path / "new") == ["log", "marker"]


def test_an_evaluation_that_is_refused_leaves_nothing(tmp_path, capsys):
    rows = [{"question": "Who?", "answer": "Ned. \ud800", "perturbed_answer": ["Ted."]}]
    for name in ("forget10_perturbed", "retain_perturbed"):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    before = names(tmp_path)
    base = str(builders.llama_directory())
    assert main(["evaluate", "--model", base, "--suite", f"tofu={tmp_path}", "--output", str(tmp_path / "o")]) == 2
    assert "peft-perta: error: forget, row 1: '\\ud800' is half of a character" in capsys.readouterr().err
    assert names(tmp_path) == before
