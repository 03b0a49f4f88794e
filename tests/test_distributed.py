"""Several processes emit the adapter that one emits; sharded models are refused."""

import collections
import json
import multiprocessing
import os
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

from peft_perta import ConfigError, load_base
from peft_perta.cli import main
from peft_perta.gradients import Plan, checkpoint, engine
from peft_perta.gradients._taps import Taps
from peft_perta.model import distributed
from peft_perta.model.distributed import refuse_sharded

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


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    state = load_file(directory / "adapter_model.safetensors")
    return {
        key: state[key.replace("lora_A", "lora_B")].double() @ A.double() for key, A in state.items() if "lora_A" in key
    }


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


LAYER_BY_LAYER = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
import builders, torch
from peft_perta import PerTAConfig
from peft_perta.data import load_samples
from peft_perta.gradients import Collector, Job, Limits, choose_plan, gather
from peft_perta.perta import GRANULARITIES
from peft_perta.model import distributed, resolve_targets

distributed.start()
model = builders.adapted_llama()
targets = resolve_targets(model, "forget")
rows = dict(forget=builders.forget_rows(), retain=builders.retain_rows())
sets = {{name: load_samples(found, builders.tokenizer()) for name, found in rows.items()}}
collector = Collector((GRANULARITIES["delta"],))
job = Job(model, targets, sets, collector, "mean", limits=Limits(1), show_progress_bar=False)
plan = dataclasses.replace(choose_plan(job), mode="layerwise")
sums = {{}}
for group, found in gather(job, plan):
    for target in group:
        sums[target.name] = {{name: of[target.name].gradients["weight"] for name, of in found.items()}}
if distributed.is_main():
    torch.save(sums, sys.argv[1])
distributed.finish()
"""


def test_two_processes_agree_in_layerwise_mode(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(LAYER_BY_LAYER.format(tests=str(Path(__file__).parent)))
    one = run([sys.executable, str(script), str(tmp_path / "one.pt")])
    two = run([*LAUNCH[:-2], str(script), str(tmp_path / "two.pt")])
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    expected, found = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert len(expected) == 14
    for name, of_sets in expected.items():
        for key, total in of_sets.items():
            assert (found[name][key] - total).norm() <= 1e-6 * total.norm(), (name, key)


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


def one_of_two(rank, port, at, path):
    """One of two processes that gather two groups of layers.

    The main process writes slowly, the other one reads slowly. Both are interrupted before backward number ``at``; the
    next two processes make the same call again.
    """
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}

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
        if taken == at:
            raise KeyboardInterrupt("on purpose")
        taken += 1
        return backward(*args, **kwargs)

    def added(taps, target, *args):
        layers[target.name] += 1
        return add(taps, target, *args)

    torch.Tensor.backward, Taps._add = counted, added
    distributed.start()
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_perta.cli.unlearn"])
    for at in ({0: 3 + 2 + 3, 1: 2 + 2 + 2}, {0: None, 1: None}):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = [context.Process(target=one_of_two, args=(rank, port, at[rank], tmp_path)) for rank in (0, 1)]
        for child in both:
            child.start()
        for child in both:
            child.join(100)
        assert [child.exitcode for child in both] == ([0, 0] if at[0] is None else [130, 130])
    for rank in (0, 1):
        state_dict, layers = torch.load(tmp_path / f"result {rank}", weights_only=False)
        for key, tensor in expected.items():
            assert (state_dict[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
        assert {name.split(".")[2] for name in layers} == {"0"}, "the upper group is not computed again"
        assert set(layers.values()) == {2}, "nor is the forget set of the lower group"


FSDP2 = """
import os, sys
sys.path.insert(0, {tests!r})
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT={port!r}, RANK="0", WORLD_SIZE="1")
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import builders
from peft_perta import ConfigError
from peft_perta.perta import get_perta_state_dict
from peft_perta import PerTAConfig
dist.init_process_group("gloo")
model = builders.adapted_llama()
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
try:
    get_perta_state_dict(model, PerTAConfig(), builders.forget_rows(), builders.retain_rows())
except ConfigError as error:
    print(error)
dist.destroy_process_group()
"""


def test_fsdp2_is_refused(tmp_path):
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2.format(tests=str(Path(__file__).parent), port=str(29500 + os.getpid() % 1000)))
    finished = run([sys.executable, str(script)])
    assert "DTensor (FSDP2 or tensor parallelism)" in finished.stdout, finished.stderr
    assert "load the whole model in every process" in finished.stdout


def test_zero3_is_refused():
    model = builders.adapted_llama()
    next(model.parameters()).ds_id = 0  # DeepSpeed marks the parameters that it partitions like this
    with pytest.raises(ConfigError, match=r"embed_tokens.* is partitioned by DeepSpeed ZeRO-3.*load the whole model"):
        refuse_sharded(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FullyShardedDataParallel", "sharded by FSDP, expected a model with whole weights.*load the whole model"),
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
