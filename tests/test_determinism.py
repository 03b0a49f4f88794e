"""The same seed and inputs give the same bytes, in this process and in another; the batch size does not matter."""

import os
import subprocess
import sys
from pathlib import Path

import builders
import laws
import pytest
import torch

from peft_perta import save_perta_adapter

SETTINGS = {"granularity": "delta", "weighting": "fisher", "max_samples": 3, "seed": 4, "rank": 0.7}


def emit(path):
    torch.rand(7)  # the state of the global generator must not matter
    return save_perta_adapter(path, *builders.negate(builders.adapted_llama(), **SETTINGS))


def contents(path):
    """Every file's bytes."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    assert contents(emit(tmp_path / "one")) == contents(emit(tmp_path / "two"))


def test_another_process_with_another_hash_seed_gives_the_same_bytes(tmp_path):
    program = (
        "import sys, pathlib, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "import test_determinism; test_determinism.emit(pathlib.Path(sys.argv[2]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "two")],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert contents(tmp_path / "two") == contents(emit(tmp_path / "one"))


def test_another_seed_draws_other_samples():
    model = builders.adapted_llama()
    drawn = {builders.negate(model, max_samples=2, seed=seed)[2].data["forget"]["sha256"] for seed in range(5)}
    assert len(drawn) > 1


@pytest.mark.parametrize("granularity", ["factor", "delta", "separable"])
@pytest.mark.parametrize("weighting", ["grad", "empirical-fisher"])
@pytest.mark.parametrize("directions", [False, True], ids=["", "directions"])
def test_a_batch_size_changes_nothing(granularity, weighting, directions):
    settings = {"granularity": granularity, "weighting": weighting, "rank": 64, "input_directions": directions}
    one, five = (
        laws.deltas_of(builders.negate(builders.adapted_llama(), batch_size=size, **settings)[1]) for size in (1, 5)
    )
    for name in one:
        laws.close(five[name], one[name], 1e-4, name)


def test_which_adapters_are_active_does_not_matter():
    model = builders.adapted_llama()
    results = []
    for active in ("forget", "task"):
        model.set_adapter(active)
        results.append(builders.negate(model)[1])
    model.base_model.disable_adapter_layers()
    results.append(builders.negate(model)[1])
    assert all(torch.equal(results[0][key], result[key]) for result in results[1:] for key in results[0])


def test_gradients_at_origin_and_at_full_differ():
    """With a task adapter they differ; without one, the full model is the base."""
    model = builders.adapted_llama()
    origin = builders.negate(model)[1]
    full = builders.negate(model, gradients_at="full", task_adapter="task")[1]
    bare = builders.negate(model, gradients_at="full")[1]
    assert any(not torch.equal(origin[key], full[key]) for key in origin)
    assert all(torch.equal(origin[key], bare[key]) for key in origin)
