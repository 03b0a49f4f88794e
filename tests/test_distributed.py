"""Several processes emit the adapter that one emits, also of a model that FSDP2 shards over them."""

import collections
import dataclasses
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from peft_perta import (
    ConfigError,
    PerTAError,
    UnlearningSettings,
    erase_instances,
    load_base,
    train_forget_adapter,
    train_unlearning,
    unlearn,
)
from peft_perta.cli import main
from peft_perta.data import load_samples
from peft_perta.evaluation import Subject
from peft_perta.gradients import (
    Collector,
    InputMoments,
    Job,
    Limits,
    Plan,
    checkpoint,
    choose_plan,
    engine,
    find_blocks,
    gather,
)
from peft_perta.gradients._probe import measure
from peft_perta.gradients._taps import Taps
from peft_perta.model import distributed, resolve_targets
from peft_perta.model.distributed import refuse_sharded
from peft_perta.perta import GRANULARITIES, RefinementSettings, refine_adapter

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "peft_perta"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a forget adapter for the tiny Llama on disk, and the rows of both sets."""
    directory = tmp_path_factory.mktemp("inputs")
    adapted = builders.with_adapters(load_base(str(builders.llama_directory()), dtype=torch.float32)[0])
    adapted.save_pretrained(directory, selected_adapters=["forget"])
    for name, rows in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        *("unlearn", "--model", str(builders.llama_directory()), "--forget-adapter", str(inputs / "forget")),
        *("--forget", str(inputs / "forget.jsonl"), "--retain", str(inputs / "retain.jsonl")),
        *("--output", str(output), *more),
    ]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)


def products(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: state[key.replace("lora_A", "lora_B")].double() @ A.double() for key, A in state.items() if "lora_A" in key
    }


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    return products(load_file(directory / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            ["--granularity", "delta", "--weighting", "empirical-fisher", "--batch-size", "1"], marks=pytest.mark.slow
        ),
        ["--batch-size", "2"],  # mean gradients per factor; the processes have different batches
    ],
    ids=["delta-squares", "factor-mean"],
)
def test_two_processes_emit_the_adapter_that_one_emits(settings, inputs, tmp_path):
    assert main(arguments(inputs, tmp_path / "one", *settings)) == 0
    two = run([*LAUNCH, *arguments(inputs, tmp_path / "two", *settings)])
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("It is in") == 1  # only the main process prints
    expected, found = deltas(tmp_path / "one"), deltas(tmp_path / "two")
    assert set(found) == set(expected)
    for key, delta in expected.items():
        assert delta.norm() > 0
        assert (found[key] - delta).norm() <= 1e-6 * delta.norm(), key
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]  # no checkpoint is left


def test_an_error_in_one_process_ends_all(inputs, tmp_path):
    """Only one of the processes has the row whose loss is not finite."""
    broken = tmp_path / "broken"
    model, tokenizer = load_base(str(builders.llama_directory()), dtype=torch.float32)
    tokenizer.save_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~")["input_ids"][0]] = torch.nan
    model.save_pretrained(broken)
    rows = [*builders.forget_rows(), {"text": "~"}]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = arguments(inputs, tmp_path / "out", "--batch-size", "1")
    command[command.index("--model") + 1] = str(broken)
    command[command.index("--forget") + 1] = str(tmp_path / "forget.jsonl")
    config = json.loads((inputs / "forget" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(broken)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = "adapter_model.safetensors"
    (adapter / weights).write_bytes((inputs / "forget" / weights).read_bytes())
    command[command.index("--forget-adapter") + 1] = str(adapter)
    finished = run([*LAUNCH, *command])
    assert finished.returncode != 0
    assert "the loss is nan" in finished.stderr
    assert not (tmp_path / "out").exists()


def join_two(rank, port):
    """Become one of two processes on this machine."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    distributed.start()


def two_processes(target, *arguments):
    """The exit codes of two processes that run ``target(rank, port, *arguments)``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_perta.cli.unlearn", "peft_perta.cli.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=target, args=(rank, port, *arguments)) for rank in (0, 1)]
    for child in both:
        child.start()
    for child in both:
        child.join(200)
    return [child.exitcode for child in both]


def one_of_two(rank, port, at, path):
    """One of two processes that gather two groups of layers.

    The main process writes slowly, the other one reads slowly. Both are interrupted before backward number
    ``at[rank]``; the next two processes make the same call again.
    """
    join_two(rank, port)

    def slowly(function):
        return lambda *args, **kwargs: (time.sleep(0.2), function(*args, **kwargs))[1]

    def two_groups(measured, taken, budget, batch_size, modes):
        names = [layer.name for layer in reversed(measured.layers)]
        return Plan("grouped", (tuple(names[:7]), tuple(names[7:])), "device", "device", batch_size)

    engine.make_plan = two_groups
    if rank == 0:
        os.replace = slowly(os.replace)
    else:
        checkpoint.safe_open = slowly(checkpoint.safe_open)
    taken, backward, add = 0, torch.Tensor.backward, Taps._add
    layers = collections.Counter()

    def counted(*args, **kwargs):
        nonlocal taken
        if taken == at[rank]:
            raise KeyboardInterrupt("on purpose")
        taken += 1
        return backward(*args, **kwargs)

    def added(taps, target, *args):
        layers[target.name] += 1
        return add(taps, target, *args)

    torch.Tensor.backward, Taps._add = counted, added
    try:
        result = builders.negate(
            builders.adapted_llama(), checkpoint_dir=path / "c", granularity="delta", rank=3, batch_size=1
        )
    except KeyboardInterrupt:
        os._exit(130)  # a launcher would end the other process; here both get to this line
    finally:
        builders._scratch.cleanup()
    torch.save((result[1], dict(layers)), path / f"result {rank}")
    distributed.finish()


def test_two_processes_resume_from_one_checkpoint(tmp_path):
    """The processes share 5 forget samples (3 and 2) and 4 retain samples (2 and 2). They are interrupted in the second
    group, after its forget set. However slow the disk is, both resume from the same state."""
    expected = builders.negate(builders.adapted_llama(), granularity="delta", rank=3, batch_size=1)[1]
    for at, exit_codes in (((3 + 2 + 3, 2 + 2 + 2), [130, 130]), ((None, None), [0, 0])):
        assert two_processes(one_of_two, at, tmp_path) == exit_codes
    for rank in (0, 1):
        state_dict, layers = torch.load(tmp_path / f"result {rank}", weights_only=False)
        for key, tensor in expected.items():
            assert (state_dict[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
        assert {name.split(".")[2] for name in layers} == {"0"}, "the upper group is not computed again"
        assert set(layers.values()) == {2}, "nor is the forget set of the lower group"


# Two processes that compute all of this after one start


def sharded(model, shards, *, root=True):
    """The model; where it is to be sharded, FSDP2 shards its blocks, and what is outside of them too."""
    for block in [*find_blocks(model), *([model] if root else [])] if shards else []:
        fully_shard(block)
    return model


def on_loaded_base(shards):
    """The saved Llama with its adapters, in double precision; its norms compute in single precision."""
    device_map = "fsdp" if shards else None
    base, _ = load_base(str(builders.llama_directory()), dtype=torch.float64, device_map=device_map)
    return builders.with_adapters(base, task=builders.lora_config(r=8, lora_alpha=8)).to(torch.float64)


def edits(emitted):
    return products(emitted.state_dict)


def trained(shards):
    """Two steps of SAGO with an attacker, between evaluations; the losses read the reference model and a hidden state.
    Of the rows that are held out, the third is one process's alone."""
    emitted = train_unlearning(
        on_loaded_base(shards), builders.forget_rows()[:4], builders.retain_rows(), builders.tokenizer(),
        UnlearningSettings("rmu", "embed-diff", "sago", layer=2, relearning_steps=2),
        held_out=[{"text": "One."}, {"text": "Two, four."}, {"text": "Three"}],
        task_adapter="task", lora_config=builders.lora_config(lora_dropout=0.0), show_progress_bar=False, max_steps=2,
        per_device_train_batch_size=1 if shards else 2, gradient_accumulation_steps=2, learning_rate=5e-3, eval_steps=2,
        eval_strategy="steps",
    )  # fmt: skip
    path = [list(point.values()) for point in emitted.provenance.checks]
    return edits(emitted) | {"evaluations": torch.tensor(path, dtype=torch.float64)}


def job_on(model):
    targets = resolve_targets(model, "forget")
    rows = {"forget": builders.forget_rows(), "retain": builders.retain_rows()}
    sets = {name: load_samples(found, builders.tokenizer()) for name, found in rows.items()}
    collector = Collector((GRANULARITIES["delta"],), (InputMoments(),))
    return Job(model, targets, sets, collector, "squares", limits=Limits(1), show_progress_bar=False)


def measured_bytes(model, shards):
    """What the planner counts. Beside a whole model's bytes, a sharded one needs what FSDP2 gathers."""
    measured = measure(job_on(model))
    blocks = [sum(8 * parameter.numel() for parameter in block.parameters()) for block in find_blocks(model)]
    gathered = 0 if shards else sum(8 * p.numel() for p in model.parameters()) - sum(blocks) + 4 * max(blocks)
    found = measured.activations["cpu"], measured.block_activations["cpu"], measured.fixed["cpu"] + gathered
    return {"bytes": torch.tensor(found, dtype=torch.float64)}


def layerwise_sums(model):
    job = job_on(model)
    plan = dataclasses.replace(choose_plan(job), mode="layerwise")
    return {
        f"{target.name} {name} {kind}": total
        for group, found in gather(job, plan)
        for target in group
        for name, of_set in found.items()
        for kind, total in {**of_set[target.name].gradients, **of_set[target.name].moments}.items()
    }


COMPUTED = {  # name -> what is computed, given whether FSDP2 shards the model, and a place for files
    "layer by layer, whole": lambda shards, place: layerwise_sums(builders.adapted_llama(torch.float64)),
    "layer by layer": lambda shards, place: layerwise_sums(sharded(builders.adapted_llama(torch.float64), shards)),
    "bytes": lambda shards, place: measured_bytes(sharded(builders.adapted_llama(torch.float64), shards), shards),
    "unlearn": lambda shards, place: edits(
        builders.negate(sharded(builders.adapted_llama(torch.float64), shards), input_directions=None, batch_size=1)
    ),
    "refine": lambda shards, place: edits(
        refine_adapter(
            sharded(builders.adapted_llama(torch.float64), shards), "forget", builders.forget_rows(),
            builders.retain_rows(), RefinementSettings(batch_size=1), tokenizer=builders.tokenizer(),
            show_progress_bar=False,
        )
    ),
    "train": lambda shards, place: trained(shards),
}  # fmt: skip
ALSO_COMPUTED = {
    "unlearn, blocks alone": lambda shards, place: edits(
        builders.negate(
            sharded(builders.adapted_gpt2(torch.float64), shards, root=False), input_directions=None, batch_size=1
        )
    ),
    "unlearn, flat inputs": lambda shards, place: edits(
        builders.negate(
            sharded(builders.adapted_opt(("fc1", "v_proj")).double(), shards), granularity="delta",
            weighting="empirical-fisher",
        )
    ),
    "unlearn, experts": lambda shards, place: edits(
        builders.negate(sharded(builders.adapted_mixtral(), shards), batch_size=1)
    ),
    "unlearn, checkpoint and strength": lambda shards, place: edits(
        builders.negate(
            on_loaded_base(shards), input_directions=None, granularity="delta", rank=3, strength="auto",
            retain_tolerance=0.1, checkpoint_dir=place / "checkpoint",
        )
    ),
    "unlearn, 4-bit": lambda shards, place: edits(
        builders.negate(sharded(builders.adapted_nf4_llama(), shards), weighting="grad", batch_size=1)
    ),
}  # fmt: skip


def tensor_parallel():
    model = builders.llama()
    head = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    model.lm_head.weight = nn.Parameter(head)
    return model


def hybrid():
    model = builders.adapted_llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards")))
    return model


def nan_of_one_row():
    model = builders.adapted_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[builders.tokenizer()("~")["input_ids"][0]] = torch.nan
    return model


REFUSED = {  # name -> (what is refused, given a sharded model, and a place for files; the message)
    "erase": (
        lambda model, place: erase_instances(
            model, builders.forget_rows(), builders.forget_rows()[:1], builders.tokenizer()
        ),
        "sharded by FSDP2, expected whole weights; load the whole model in every process",
    ),
    "evaluate": (lambda model, place: Subject(model, builders.tokenizer()), "sharded by FSDP2, expected whole weights"),
    "forget": (
        lambda model, place: train_forget_adapter(model, builders.forget_rows(), builders.tokenizer()),
        "sharded by FSDP2, expected whole weights",
    ),
    "the whole job": (
        lambda model, place: unlearn(
            model, forget=builders.forget_rows(), retain=builders.retain_rows(), tokenizer=builders.tokenizer()
        ),
        "sharded by FSDP2, expected whole weights",
    ),
    "tensor parallelism": (
        lambda model, place: builders.negate(tensor_parallel()),
        r"lm_head.weight is a DTensor on a mesh of \(2,\).*tensor parallelism",
    ),
    "hybrid sharding": (
        lambda model, place: builders.negate(hybrid()),
        r"is a DTensor on a mesh of \(1, 2\).*hybrid sharding",
    ),
    "8 bit": (
        lambda model, place: builders.negate(sharded(builders.adapted_int8_llama(), True)),
        "is an 8-bit weight that FSDP2 shards, without its scales",
    ),
    "train, sharded after loading": (
        lambda model, place: train_unlearning(
            model, builders.forget_rows(), builders.retain_rows(), builders.tokenizer()
        ),
        "sharded after it was loaded.*load_base",
    ),
    "train, with checkpoints": (
        lambda model, place: train_unlearning(
            on_loaded_base(True), builders.forget_rows(), builders.retain_rows(), builders.tokenizer(),
            checkpoint_dir=place / "no checkpoint",
        ),
        "expected no checkpoint_dir, and save_strategy 'no', found 'epoch'",
    ),
    "4-bit on loading": (
        lambda model, place: load_base(str(builders.llama_directory()), four_bit=True, device_map="fsdp"),
        "expected safetensors in a floating-point type, found NF4",
    ),
    "strength of 4-bit": (
        lambda model, place: builders.negate(
            sharded(builders.adapted_nf4_llama(), True), strength="auto", retain_tolerance=0.5
        ),
        "a 4-bit layer that FSDP2 shards.*expected a fixed strength",
    ),
    "one process's loss": (
        lambda model, place: builders.negate(
            sharded(nan_of_one_row(), True), [*builders.forget_rows(), {"text": "~"}], batch_size=1
        ),
        "the forget set, sample 6: the loss is nan",
    ),
}  # fmt: skip


def refusals(place):
    """name -> the message of what is refused."""
    model = sharded(builders.adapted_llama(), True)
    found = {}
    for name, (attempt, _) in REFUSED.items():
        try:
            attempt(model, place)
        except PerTAError as error:
            found[name] = str(error)
    return found


def one_that_computes(rank, port, table, base, place):
    join_two(rank, port)
    builders.llama_directory = lambda: base  # transformers writes nothing in the second process
    results = {name: compute(True, place) for name, compute in globals()[table].items()}
    torch.save((results, refusals(place) if table == "COMPUTED" else {}), place / f"result {rank}")
    builders._scratch.cleanup()
    distributed.finish()


def computed_by_two(table, place):
    """What each of two processes computes of a table, and the messages of what they refuse."""
    assert two_processes(one_that_computes, table, builders.llama_directory(), place) == [0, 0]
    return [torch.load(place / f"result {rank}", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return computed_by_two("COMPUTED", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory):
    return computed_by_two("ALSO_COMPUTED", tmp_path_factory.mktemp("two"))


def check_as_one(of_two, name, compute, place):
    expected = compute(False, place)
    for results, _ in of_two:
        assert results[name].keys() == expected.keys()
        for key, tensor in expected.items():
            assert tensor.norm() > 0
            assert (results[name][key] - tensor).norm() <= 1e-6 * tensor.norm(), key


@pytest.mark.parametrize("name", COMPUTED)
def test_two_processes_compute_what_one_computes(name, of_two, tmp_path):
    check_as_one(of_two, name, COMPUTED[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALSO_COMPUTED)
def test_two_processes_compute_more_as_one_does(name, more_of_two, tmp_path):
    check_as_one(more_of_two, name, ALSO_COMPUTED[name], tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_sharded_model_is_refused_in_all_processes(name, of_two):
    for _, refused in of_two:
        assert re.search(REFUSED[name][1], refused[name])


def test_one_process_shards_nothing():
    with pytest.raises(ConfigError, match="expected several processes to shard the model over, found one"):
        load_base(str(builders.llama_directory()), device_map="fsdp")


def test_zero3_is_refused():
    model = builders.adapted_llama()
    next(model.parameters()).ds_id = 0  # DeepSpeed marks the parameters that it partitions like this
    with pytest.raises(ConfigError, match=r"embed_tokens.* is partitioned by DeepSpeed ZeRO-3.*load the whole model"):
        refuse_sharded(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FullyShardedDataParallel", "sharded by FSDP1, expected FSDP2.*load the whole model"),
        ("DistributedDataParallel", r"wrapped in DistributedDataParallel, expected the bare model.*pass model\.module"),
    ],
)
def test_a_parallel_wrapper_is_refused(name, message):
    wrapper = type(name, (nn.Module,), {})()
    wrapper.module = builders.llama()
    with pytest.raises(ConfigError, match=message):
        refuse_sharded(wrapper)


def test_a_whole_model_is_accepted():
    refuse_sharded(builders.adapted_llama())
