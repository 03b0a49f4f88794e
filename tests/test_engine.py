"""Every mode against a loop over samples: places, offloading, low precision, unusual layers, too little memory."""

import functools
import itertools
import weakref
from contextlib import closing

import builders
import laws
import pytest
import tables
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from peft_perta import NumericalError, UnsupportedLayerError
from peft_perta.data import load_samples
from peft_perta.gradients import Limits, Plan, choose_plan, gather
from peft_perta.gradients._chain_check import why_no_chain
from peft_perta.gradients._planning import make_plan
from peft_perta.gradients._probe import measure
from peft_perta.model import resolve_targets
from peft_perta.perta import GRANULARITIES

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*use_reentrant")
modes = pytest.mark.parametrize("mode", tables.MODES)
kinds = pytest.mark.parametrize("kind", tables.LAYERS)
statistics = pytest.mark.parametrize("statistic", ["mean", "squares"])
SETS = {
    "forget": load_samples(builders.forget_rows(), builders.tokenizer()),
    "retain": load_samples(builders.retain_rows(), builders.tokenizer()),
}
EXPERTS = (builders.adapted_mixtral, builders.adapted_gpt_oss)


def plan(model, mode, place="device", micro_batch=2, groups=None):
    """All layers in one group; their sums, or the blocks' inputs, in this place."""
    names = tuple(target.name for target in reversed(resolve_targets(model, "forget")))
    return Plan(mode, groups or (names,), place, place, micro_batch)


@functools.cache
def by_the_loop(build, granularity="delta", statistic="mean", adapters=()):
    model = build()
    return {
        name: laws.sums_by_the_loop(model, samples, granularity, statistic, list(adapters))
        for name, samples in SETS.items()
    }


def equals_the_loop(model, expected, plan, granularity="delta", statistic="mean", adapters=(), tolerance=2e-6):
    found = laws.gathered(model, SETS, granularity, statistic, plan, list(adapters))
    for name, sums in expected.items():
        laws.sums_are(found[name], sums, tolerance)
    return found


@functools.cache
def built(kind):
    return tables.LAYERS[kind]()


@kinds
@modes
@pytest.mark.parametrize("granularity", ["delta", "factor"])
@statistics
def test_both_modes_equal_the_loop(kind, mode, granularity, statistic):
    model, size = built(kind), tables.batch_size(kind, statistic)
    with laws.untouched(model):
        expected = by_the_loop(tables.LAYERS[kind], granularity, statistic)
        equals_the_loop(model, expected, plan(model, mode, micro_batch=size), granularity, statistic)


@kinds
@modes
@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize(("granularity", "statistic"), [("factor", "mean"), ("delta", "squares")])
def test_the_place_does_not_matter(kind, mode, place, granularity, statistic):
    model, size = built(kind), tables.batch_size(kind, statistic)
    expected = by_the_loop(tables.LAYERS[kind], granularity, statistic)
    equals_the_loop(model, expected, plan(model, mode, place, size), granularity, statistic)


@modes
@statistics
@pytest.mark.parametrize("adapters", [(), ("task",)], ids=["origin", "full"])
def test_fused_projections(mode, statistic, adapters):
    """Queries, keys and values in one layer, with fewer heads for keys and values than for queries."""
    model = builders.adapted_phi3()
    expected = by_the_loop(builders.adapted_phi3, "delta", statistic, adapters)
    equals_the_loop(model, expected, plan(model, mode), "delta", statistic, adapters)


@pytest.mark.parametrize("build", EXPERTS)
@modes
@pytest.mark.parametrize("adapters", [("task",), ("forget", "task")], ids="+".join)
def test_experts_with_adapters_on_them(build, mode, adapters):
    """PEFT hides the parameter behind one that adds the deltas, in different ways for one adapter and for several."""
    model = build()
    with laws.untouched(model):
        equals_the_loop(model, by_the_loop(build, adapters=adapters), plan(model, mode), adapters=adapters)


@modes
@pytest.mark.parametrize("granularity", ["delta", "factor"])
@statistics
def test_experts_that_are_stored_transposed(mode, granularity, statistic):
    model, size = builders.adapted_gpt_oss(), tables.batch_size("experts", statistic)
    expected = by_the_loop(builders.adapted_gpt_oss, granularity, statistic)
    equals_the_loop(model, expected, plan(model, mode, micro_batch=size), granularity, statistic)


def experts_and_layers():
    config = builders.lora_config(["q_proj", "v_proj"], target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)
    return builders.with_adapters(builders.mixtral(), config)


def weight_as_a_parameter():
    """PEFT's ``target_parameters`` on the weight of a linear layer: a single expert."""
    return builders.with_adapters(
        builders.llama(), builders.experts_config(target_parameters=["q_proj.weight", "down_proj.weight"])
    )


@pytest.mark.parametrize("build", [experts_and_layers, weight_as_a_parameter])
@modes
@statistics
@pytest.mark.parametrize("adapters", [(), ("forget",)], ids=["off", "on"])
def test_parameters_beside_layers(build, mode, statistic, adapters):
    model, size = build(), tables.batch_size("experts", statistic)
    with laws.untouched(model):
        expected = by_the_loop(build, "factor", statistic, adapters)
        equals_the_loop(model, expected, plan(model, mode, micro_batch=size), "factor", statistic, adapters)


def llama_with_head():
    return builders.with_adapters(builders.llama(), builders.lora_config(["lm_head", "v_proj"]))


def llama_with_head_alone():
    return builders.with_adapters(builders.llama(), builders.lora_config(["lm_head"]))


@pytest.mark.parametrize("build", [llama_with_head, llama_with_head_alone])
@modes
@statistics
def test_an_adapted_head(build, mode, statistic):
    model = build()
    expected = by_the_loop(build, "delta", statistic)
    equals_the_loop(model, expected, plan(model, mode), "delta", statistic)


def flattened_opt():
    return builders.adapted_opt(("q_proj", "fc1", "fc2"))


@modes
@pytest.mark.parametrize(("statistic", "size"), [("mean", 2), ("squares", 1)])
def test_layers_with_flattened_samples(mode, statistic, size):
    model = flattened_opt()
    expected = by_the_loop(flattened_opt, "factor", statistic)
    equals_the_loop(model, expected, plan(model, mode, micro_batch=size), "factor", statistic)


@modes
def test_squares_of_layers_with_flattened_samples_need_batches_of_one(mode):
    model = flattened_opt()
    with laws.untouched(model), pytest.raises(UnsupportedLayerError, match=r"need batch_size=1"):
        laws.gathered(model, SETS, "factor", "squares", plan(model, mode))


@pytest.mark.parametrize("build", [flattened_opt, *EXPERTS])
def test_the_plan_takes_squares_one_sample_at_a_time_where_it_must(build):
    model, adapted = build(), builders.adapted_llama()
    for statistic, size in (("mean", 4), ("squares", 1)):
        assert planned(model, statistic, batch_size=4).micro_batch == size
        assert planned(adapted, statistic, batch_size=4).micro_batch == 4


def planned(model, statistic="mean", granularity="factor", **limits):
    return choose_plan(laws.job_of(model, SETS, granularity, statistic, limits=Limits(**limits)))


@pytest.mark.parametrize("kind", ["linear", "experts"])
@modes
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(kind, mode, reentrant):
    model = tables.LAYERS[kind]()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_base_model().disable_input_require_grads()
    model.train()
    with laws.untouched(model):
        expected = by_the_loop(tables.LAYERS[kind], "factor", "mean", ("task",))
        equals_the_loop(model, expected, plan(model, mode), "factor", "mean", ("task",))


# Groups


def test_groups_come_as_planned_and_each_goes_back_no_further_than_it_must():
    model = builders.adapted_llama()
    names = [target.name for target in reversed(resolve_targets(model, "forget"))]
    groups = tuple(map(tuple, (names[:1], names[1:7], names[7:8], names[8:])))
    expected = by_the_loop(builders.adapted_llama, "factor")
    layer = model.get_base_model().model.layers[0]
    job = laws.job_of(model, SETS, "factor")
    reached = []
    handle = layer.register_forward_hook(lambda module, args, output: reached.append(output.requires_grad))
    came = []
    with closing(gather(job, plan(model, "grouped", groups=groups))) as stream:
        for group, sums in stream:
            came.append((tuple(target.name for target in group), set(reached)))
            reached.clear()
            for name in SETS:
                laws.sums_are(sums[name], {t.name: expected[name][t.name] for t in group}, 2e-6)
    handle.remove()
    assert came == list(zip(groups, [{False}, {False}, {True}, {True}], strict=True))


def streamed(model, mode, **plans):
    return closing(gather(laws.job_of(model, SETS), plan(model, mode, **plans)))


def test_blocks_come_from_the_top():
    model = experts_and_head()
    with streamed(model, "layerwise") as stream:
        came = [[target.name for target in group] for group, _ in stream]
    assert came[0] == ["lm_head"]
    assert [name.partition(".mlp")[0] for name in (came[1][0], came[2][0])] == ["model.layers.1", "model.layers.0"]
    assert list(map(len, came)) == [1, 8, 8]


def experts_and_head():
    config = builders.lora_config(["lm_head"], target_parameters=builders.EXPERT_PARAMETERS, lora_dropout=0.0)
    return builders.with_adapters(builders.mixtral(), config)


@modes
def test_only_the_layers_of_the_job_are_summed(mode):
    """A plan of all layers; a block without a layer of the job only propagates the gradient."""
    model = builders.adapted_llama()
    job = laws.job_of(model, SETS)
    names = {target.name for target in job.targets}
    done = {name for name in names if ".layers.1." in name or "q_proj" in name}
    left = names - done
    expected = by_the_loop(builders.adapted_llama)
    with closing(gather(job.without(done), plan(model, mode))) as stream:
        ((group, sums),) = stream
    assert {target.name for target in group} == left
    laws.sums_are(sums["forget"], {name: expected["forget"][name] for name in left}, 2e-6)
    assert not list(gather(job.without(names), plan(model, mode)))


@modes
def test_sums_are_freed_as_they_are_taken(mode):
    model = builders.adapted_llama()
    with streamed(model, mode) as stream:
        for group, sums in stream:
            for target in group:
                of_layer = [per_layer.pop(target.name) for per_layer in sums.values()]
                references = [weakref.ref(total) for of_set in of_layer for total in of_set.tensors()]
                assert references
                del of_layer
                assert not any(reference() is not None for reference in references)


# The model is restored


class Stop(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("build", [builders.adapted_llama, builders.adapted_mixtral])
@modes
@pytest.mark.parametrize("place", ["forward", "later forward", "backward", "sums"])
def test_an_exception_leaves_no_trace(build, mode, place, monkeypatch):
    model = build().train()
    layer = model.get_base_model().model.layers[1]
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if place != "later forward" or len(calls) > (4 if mode == "grouped" else 7):
            raise Stop("on purpose")

    if place == "backward":
        layer.register_full_backward_hook(fail)
    elif place == "sums":
        monkeypatch.setattr("peft_perta.gradients.gradient_sums.GradientSums.add", fail)
    else:
        layer.register_forward_hook(fail)
    with laws.untouched(model), pytest.raises(Stop, match="on purpose"):
        laws.gathered(model, SETS, "factor", "mean", plan(model, mode))


@modes
def test_an_iterator_that_is_closed_early_leaves_no_trace(mode):
    model = builders.adapted_mixtral().train()
    with laws.untouched(model), streamed(model, mode) as stream:
        next(stream)


@modes
def test_a_loss_that_is_not_finite_is_refused(mode):
    model = builders.adapted_llama()
    model.get_input_embeddings().weight.data[SETS["retain"][2].input_ids[0]] = torch.nan
    with laws.untouched(model), pytest.raises(NumericalError, match=r"set, sample \d: the loss is nan"):
        laws.gathered(model, SETS, "factor", "mean", plan(model, mode))


# Offloaded models


def on_cpu(base, directory):
    return cpu_offload(base, execution_device=torch.device("cpu"))


def on_disk(base, directory):
    return disk_offload(base, directory, execution_device=torch.device("cpu"))


def on_both(base, directory):
    here = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1"]
    places = {**dict.fromkeys(here, "cpu"), "model.layers.0": "disk"}
    return dispatch_model(base, places, main_device="cpu", offload_dir=directory, force_hooks=True)


offloads = pytest.mark.parametrize("offload", [on_cpu, on_disk, on_both])


@pytest.mark.parametrize(
    ("build", "adapters"),
    # PEFT itself cannot run an adapter on expert parameters that are offloaded.
    [(builders.adapted_llama, ("task",)), (builders.adapted_mixtral, ())],
)
@modes
@offloads
def test_offloaded_models_give_the_same(build, adapters, mode, offload, tmp_path):
    model = build()
    here = laws.gathered(model, SETS, "factor", "mean", plan(model, mode), list(adapters))
    offload(model.get_base_model(), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    with laws.untouched(model):
        away = laws.gathered(model, SETS, "factor", "mean", plan(model, mode), list(adapters))
    for name in SETS:
        laws.sums_are(away[name], {layer: of_layer.gradients for layer, of_layer in here[name].items()}, 0.0)


@modes
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_leaves_offloaded_weights_where_they_rest(mode, reentrant, tmp_path):
    model = builders.adapted_mixtral()
    on_disk(model.get_base_model(), tmp_path)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    with laws.untouched(model):
        equals_the_loop(model, by_the_loop(builders.adapted_mixtral), plan(model, mode))


@offloads
@pytest.mark.parametrize("build", [builders.adapted_llama, builders.adapted_mixtral])
def test_an_offloaded_model_is_planned_for_and_emitted_as_any(build, offload, tmp_path):
    model = build()
    expected = builders.negate(model)[1]
    offload(model.get_base_model(), tmp_path)
    with laws.untouched(model):
        assert why_no_chain(laws.job_of(model, SETS)) is None
        found = builders.negate(model)[1]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Low precision


def all_of_mixtral():
    """Every token uses every expert: otherwise rounding would change the choice."""
    return builders.adapted_mixtral(chosen=4)


def all_of_gpt_oss():
    return builders.adapted_gpt_oss(chosen=4)


ROUNDING = 0.05  # relative error of a tiny model's bfloat16 gradients, at the worst layer
rounded = pytest.mark.parametrize("build", [builders.adapted_llama, all_of_mixtral, all_of_gpt_oss])


@rounded
@modes
@statistics
def test_autocast_is_summed_in_float32(build, mode, statistic):
    model, size = build(), tables.batch_size("experts", statistic)
    expected = by_the_loop(build, "delta", statistic, ("task",))
    with torch.autocast("cpu", torch.bfloat16):
        found = equals_the_loop(
            model, expected, plan(model, mode, micro_batch=size), "delta", statistic, ("task",), ROUNDING
        )
    assert {total.dtype for s in found["forget"].values() for total in s.tensors()} == {torch.float32}


def test_under_autocast_layers_that_share_their_input_share_its_cast(monkeypatch):
    model = builders.adapted_llama()
    inputs = {}
    delta = type(GRANULARITIES["delta"])
    gradient = delta.gradient

    def spy(self, target, layer_input, output_gradient):
        inputs[target.name.rpartition(".layers.0.")[2]] = layer_input
        return gradient(self, target, layer_input, output_gradient)

    monkeypatch.setattr(delta, "gradient", spy)
    with torch.autocast("cpu", torch.bfloat16):
        laws.swept(model, SETS["forget"], "delta", "mean", [], len(SETS["forget"]))
    assert {held.dtype for held in inputs.values()} == {torch.bfloat16}
    q, k, v, o, gate, up = (
        inputs[f"{part}_proj"].data_ptr()
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    )
    assert q == k == v
    assert gate == up
    assert len({q, o, gate}) == 3


@rounded
@modes
@statistics
def test_bfloat16_models_are_summed_in_float32(build, mode, statistic):
    """Against the loop over the same weights in float32."""
    model, size = build().to(torch.bfloat16), tables.batch_size("experts", statistic)
    expected = by_the_loop(functools.partial(_rounded, build), "delta", statistic)
    found = equals_the_loop(
        model, expected, plan(model, mode, micro_batch=size), "delta", statistic, tolerance=ROUNDING
    )
    assert {total.dtype for s in found["forget"].values() for total in s.tensors()} == {torch.float32}


def _rounded(build):
    return build().to(torch.bfloat16).float()


# Blocks that do not form a chain


def sharing_llama():
    """Block 1 also adds the output of block 0."""
    model = builders.adapted_llama()
    first, second = model.get_base_model().model.layers
    kept = []
    first.register_forward_hook(lambda module, args, output: kept.append(output))
    second.register_forward_hook(lambda module, args, output: output + kept[-1])
    return model


CHAINS = [*tables.LAYERS.values(), builders.adapted_gpt_oss, builders.adapted_phi3, builders.adapted_opt]


@pytest.mark.parametrize("build", CHAINS)
def test_blocks_that_pass_on_nothing_but_hidden_states_are_a_chain(build):
    model = build().train()
    with laws.untouched(model):
        assert why_no_chain(laws.job_of(model, SETS, adapters=["task"])) is None


def test_blocks_that_share_more_are_no_chain():
    model = sharing_llama()
    with laws.untouched(model):
        assert "blocks share more than their hidden states" in why_no_chain(laws.job_of(model, SETS))


@pytest.fixture
def _layerwise_is_cheapest(monkeypatch):
    """A budget that holds one block's sums, but not all layers'."""
    model = builders.adapted_llama()
    measured = measure(laws.job_of(model, SETS, limits=Limits(batch_size=2)))
    monkeypatch.setattr("peft_perta.gradients.engine.taken", lambda pool: 0)
    for room in range(0, 10**8, 2**14):
        budget = {"cpu": room, "disk": 0}
        if _fits(measured, budget):
            break
    monkeypatch.setattr("peft_perta.gradients.engine.budgets", lambda *_: budget)


def _fits(measured, budget):
    try:
        return make_plan(measured, dict.fromkeys(budget, 0), budget, 2).mode == "layerwise"
    except ValueError:
        return False


@pytest.mark.usefixtures("_layerwise_is_cheapest")
def test_blocks_that_form_no_chain_are_swept_instead(capsys):
    assert planned(builders.adapted_llama(), granularity="delta", batch_size=2).mode == "layerwise"
    assert not capsys.readouterr().err
    model = sharing_llama()
    found = planned(model, granularity="delta", batch_size=2)
    assert found.mode == "grouped"
    assert len(found.groups) > 1
    assert "layer by layer is not possible (block by block" in capsys.readouterr().err
    equals_the_loop(model, by_the_loop(sharing_llama), found)


# Too little memory


def only(model, samples):
    """Make the model run out of memory with more samples than this."""

    def refuse(module, args, output):
        if len(output) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more words.")

    return model.get_base_model().model.layers[1].mlp.register_forward_hook(refuse)


@modes
@pytest.mark.parametrize(("fits", "tried"), [(2, [5, 2]), (1, [5, 2, 1])])
def test_out_of_memory_halves_the_micro_batch_and_gives_the_same(mode, fits, tried, capsys):
    model = builders.adapted_llama()
    only(model, fits)
    with laws.untouched(model):
        equals_the_loop(model, by_the_loop(builders.adapted_llama), plan(model, mode, micro_batch=5))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "out of memory" in line] == [
        f"out of memory with {before} samples at a time (CUDA out of memory. Tried to allocate 2.00 GiB.); "
        f"continuing with {after}"
        for before, after in itertools.pairwise(tried)
    ]


@modes
def test_out_of_memory_later_on_keeps_what_is_done(mode, capsys):
    model = builders.adapted_llama()
    names = [target.name for target in reversed(resolve_targets(model, "forget"))]
    expected = by_the_loop(builders.adapted_llama)
    came = []
    with streamed(model, mode, micro_batch=4, groups=(tuple(names[:7]), tuple(names[7:]))) as stream:
        for group, sums in stream:
            came.append({target.name for target in group})
            for name in SETS:
                laws.sums_are(sums[name], {t.name: expected[name][t.name] for t in group}, 2e-6)
            if len(came) == 1:
                model.get_base_model().model.layers[0].mlp.register_forward_hook(_only_two)
    assert came == [set(names[:7]), set(names[7:])]
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert lines == ["out of memory with 4 samples at a time (too little); continuing with 2"]


def _only_two(module, args, output):
    if len(output) > 2:
        raise torch.OutOfMemoryError("too little")


@modes
def test_one_sample_that_does_not_fit_is_raised(mode):
    model = builders.adapted_mixtral().train()
    only(model, 0)
    with laws.untouched(model), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        laws.gathered(model, SETS, "factor", "mean", plan(model, mode, micro_batch=4))


# What is computed


@modes
def test_logits_are_computed_only_of_tokens_whose_next_one_carries_loss(mode):
    model = builders.adapted_llama()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    laws.gathered(model, SETS, "factor", "mean", plan(model, mode, micro_batch=9))
    assert sorted(shapes) == sorted(
        (1, sum(int((s.labels[1:] != -100).sum()) for s in samples), builders.VOCABULARY) for samples in SETS.values()
    )


@modes
def test_an_adapted_head_computes_all_logits(mode):
    model = llama_with_head()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    laws.gathered(model, SETS, "factor", "mean", plan(model, mode, micro_batch=9))
    assert sorted(shapes) == sorted(
        (len(samples), max(len(s.input_ids) for s in samples), builders.VOCABULARY) for samples in SETS.values()
    )
