"""What an interrupted run leaves: whole entries, of this run and no other."""

import dataclasses
import json

import builders
import laws
import pytest
import torch
from accelerate import cpu_offload

from peft_perta import OutputError, gradients
from peft_perta.checkpoint import RUN_NAME, Checkpoint, hash_model, remove_checkpoint
from peft_perta.gradients import grouped

RUN = {"format": 1, "data": {"forget": "abc"}}


def tensors() -> dict[str, torch.Tensor]:
    return {"a|A": torch.randn(3, 4), "a|B": torch.randn(2, 3, dtype=torch.float64).T}


# Entries


def test_an_entry_comes_back_bit_for_bit(tmp_path):
    kept = Checkpoint(tmp_path / "c", RUN)
    given = tensors()
    kept.save("layers-1", given, {"x": [0.1, None], "y": "é"})
    found, record = Checkpoint(tmp_path / "c", RUN).load("layers-1")
    assert record == {"x": [0.1, None], "y": "é"}
    assert set(found) == set(given)
    assert all(torch.equal(found[key], given[key]) and found[key].dtype == given[key].dtype for key in given)
    assert kept.names() == ["layers-1"]
    assert kept.load("other") is None


def test_an_entry_takes_the_place_of_one_of_its_name(tmp_path):
    kept = Checkpoint(tmp_path / "c", RUN)
    for value in (1.0, 2.0):
        kept.save("sums", {"a": torch.tensor([value])}, {})
    assert kept.load("sums")[0]["a"].item() == 2.0
    kept.delete("sums")
    assert kept.names() == []


def test_a_write_that_fails_leaves_the_old_entry(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path / "c", RUN)
    kept.save("sums", {"a": torch.tensor([1.0])}, {})

    def full(held, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_perta.checkpoint.save_file", full)
    with pytest.raises(OutputError, match=r"sums\.safetensors could not be written: .*No space left.*free some space"):
        kept.save("sums", {"a": torch.tensor([2.0])}, {})
    assert kept.load("sums")[0]["a"].item() == 1.0
    assert sorted(path.name for path in kept.path.iterdir()) == [RUN_NAME, "sums.safetensors"]


def test_what_a_kill_left_half_written_is_cleared(tmp_path):
    Checkpoint(tmp_path / "c", RUN)
    (tmp_path / "c" / "sums.safetensors.partial").write_bytes(b"half")
    assert Checkpoint(tmp_path / "c", RUN).names() == []
    assert [path.name for path in (tmp_path / "c").iterdir()] == [RUN_NAME]


def test_a_damaged_entry_is_refused(tmp_path):
    kept = Checkpoint(tmp_path / "c", RUN)
    kept.save("sums", tensors(), {})
    path = kept.path / "sums.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OutputError, match=r"is damaged .*delete .* to start anew"):
        kept.load("sums")


def test_only_the_main_process_writes(tmp_path):
    other = Checkpoint(tmp_path / "c", RUN, writes=False)
    other.save("sums", tensors(), {})
    assert not (tmp_path / "c").exists()


# Whose they are


def test_another_run_is_refused_with_what_differs(tmp_path):
    Checkpoint(tmp_path / "c", RUN)
    with pytest.raises(OutputError, match="is the checkpoint of another run, which differs in: data, seed; go on"):
        Checkpoint(tmp_path / "c", {"format": 1, "data": {"forget": "xyz"}, "seed": 1})


@pytest.mark.parametrize("content", [None, "not json", "[]"])
def test_a_directory_of_somebody_else_is_refused_and_left_alone(content, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    if content is not None:
        (tmp_path / RUN_NAME).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="is not the checkpoint of a run of ours"):
        Checkpoint(tmp_path, RUN)
    if content is None:
        remove_checkpoint(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_finished_run_s_checkpoint_can_be_removed(tmp_path):
    kept = Checkpoint(tmp_path / "c", RUN)
    kept.save("sums", tensors(), {})
    remove_checkpoint(kept.path)
    assert not kept.path.exists()


# The model's hash


def test_adapters_are_no_part_of_the_model_s_hash():
    model = builders.llama()
    alone = hash_model(model)
    assert hash_model(builders.with_adapters(model).get_base_model()) == alone


@pytest.mark.parametrize("name", ["embed_tokens", "k_proj", "norm", "lm_head"])
def test_any_weight_changes_the_hash(name):
    model = builders.llama()
    before = hash_model(model)
    weight = next(parameter for key, parameter in model.named_parameters() if name in key)
    weight.data.view(-1)[-1] += 1e-3
    assert hash_model(model) != before


def test_the_scales_of_packed_weights_change_the_hash():
    for model, change in (
        (builders.nf4_llama(), lambda weight: weight.quant_state.absmax.view(-1)[:1].add_(1)),
        (builders.nf4_llama(), lambda weight: weight.quant_state.state2.absmax.view(-1)[:1].mul_(1.5)),
        (builders.int8_llama(), lambda weight: weight.SCB.view(-1)[:1].mul_(1.5)),
    ):
        before = hash_model(model)
        assert hash_model(model) == before
        change(model.model.layers[1].mlp.up_proj.weight)
        assert hash_model(model) != before


def test_an_offloaded_model_has_the_hash_that_it_has_at_home():
    model = builders.llama()
    before = hash_model(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert hash_model(model) == before


# Going on


@pytest.fixture
def sweeps(monkeypatch):
    """The sets that were swept; ``fail_at`` counts down to an exception in the middle of a sweep."""
    seen, plain = [], grouped.sample_losses
    state = {"fail_at": None, "seen": seen}

    def counted(model, batch):
        if state["fail_at"] is not None:
            state["fail_at"] -= 1
            if state["fail_at"] < 0:
                raise KeyboardInterrupt
        seen.append(len(batch.indices))
        return plain(model, batch)

    monkeypatch.setattr(grouped, "sample_losses", counted)
    return state


def cut_into_groups(monkeypatch, size: int) -> None:
    planned = gradients._new_plan

    def in_groups(*arguments):
        plan = planned(*arguments)
        names = [name for group in plan.groups for name in group]
        cut = tuple(tuple(names[i : i + size]) for i in range(0, len(names), size))
        return dataclasses.replace(plan, groups=cut)

    monkeypatch.setattr(gradients, "_new_plan", in_groups)


def assert_same(one: tuple, other: tuple) -> None:
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][key], other[1][key]) for key in one[1])
    assert one[2].to_dict() == other[2].to_dict()


@pytest.mark.parametrize("batches_before", [0, 3, 4, 6, 9, 13])
def test_an_interrupted_call_goes_on(batches_before, sweeps, monkeypatch, tmp_path):
    """5 forget and 4 retain samples by twos: 3 + 2 batches a group, 3 groups; whatever was whole is not done again."""
    cut_into_groups(monkeypatch, 5)
    settings = {"granularity": "delta", "batch_size": 2}
    whole = builders.negate(builders.adapted_llama(), **settings)
    assert len(sweeps["seen"]) == 15
    model = builders.adapted_llama()
    sweeps["fail_at"] = batches_before
    with laws.untouched(model), pytest.raises(KeyboardInterrupt):
        builders.negate(model, checkpoint_dir=tmp_path / "c", **settings)
    sweeps["seen"].clear()
    sweeps["fail_at"] = None
    found = builders.negate(model, checkpoint_dir=tmp_path / "c", **settings)
    assert_same(found, whole)
    done = 5 * (batches_before // 5) + (3 if batches_before % 5 >= 3 else 0)
    assert len(sweeps["seen"]) == 15 - done


def test_a_finished_call_is_not_done_again(sweeps, tmp_path):
    first = builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c", granularity="delta")
    sweeps["seen"].clear()
    again = builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c", granularity="delta")
    assert not sweeps["seen"]
    assert_same(again, first)


def test_another_budget_is_the_same_run(sweeps, tmp_path):
    """Memory is no part of what a run is: what is done stays done."""
    first = builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c", host_memory="3GiB")
    sweeps["seen"].clear()
    again = builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c", host_memory="4GiB")
    assert not sweeps["seen"]
    assert all(torch.equal(first[1][key], again[1][key]) for key in first[1])


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"forget": [{"question": "Who?", "answer": "Somebody else"}]}, "data"),
        ({"strength": 2.0}, "config"),
        ({"model": "base"}, "model"),
        ({"model": "forget"}, "forget adapter"),
    ],
    ids=["data", "config", "model", "adapter"],
)
def test_a_checkpoint_of_another_run_is_refused_before_any_gradient(change, differs, sweeps, tmp_path):
    builders.negate(builders.adapted_llama(), checkpoint_dir=tmp_path / "c")
    sweeps["seen"].clear()
    changed = dict(change)
    model = builders.adapted_llama()
    which = changed.pop("model", None)
    key = {"base": "up_proj.base_layer.weight", "forget": "up_proj.lora_B.forget.weight", None: None}[which]
    if key is not None:
        next(parameter for name, parameter in model.named_parameters() if name.endswith(key)).data.mul_(1.5)
    with pytest.raises(OutputError, match=f"another run, which differs in: {differs}; "):
        builders.negate(model, checkpoint_dir=tmp_path / "c", **changed)
    assert not sweeps["seen"]
    assert json.loads((tmp_path / "c" / RUN_NAME).read_text())["format"] == 1
