"""Input directions: the least squares against the explicit matrix, and the second moments token by token."""

import builders
import laws
import oracles
import pytest
import tables
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_perta.adapters import Product
from peft_perta.data import load_samples
from peft_perta.errors import NumericalError, UnsupportedLayerError
from peft_perta.gradients import Collector, Energies, InputMoments, Job, sweep
from peft_perta.model import resolve_targets
from peft_perta.perta._input_directions import DAMPING, weigh_input_directions

WIDTH = 12


def inputs(tokens, seed, width=WIDTH):
    """x [T, I] in float64, with very different energies over directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return x * torch.logspace(-1, 1, width, dtype=torch.float64) @ mix


def moments_of(x):
    return {"inputs": x.T @ x, "tokens": torch.full((1, 1), float(len(x)), dtype=torch.float64)}


def matrix(forget, retain):
    """M [I, I]: the edit of the identity matrix."""
    return weigh_input_directions(
        torch.eye(forget.shape[1], dtype=torch.float64), moments_of(forget), moments_of(retain)
    )[0]


def test_it_is_least_squares():
    forget, retain = inputs(50, 0), inputs(70, 1)
    C_f, C_r = forget.T @ forget / 50, retain.T @ retain / 70
    damping = DAMPING * (C_f + C_r).diagonal().mean() * torch.eye(WIDTH)
    M = matrix(forget, retain)
    torch.testing.assert_close(M, C_f @ torch.linalg.inv(C_f + C_r + damping))
    # No step away from M lowers the error that defines it.
    E = inputs(5, 2)

    def error(M):
        lost = (E @ M - E) @ C_f * (E @ M - E)
        return float((lost + (E @ M) @ (C_r + damping) * (E @ M)).sum())

    least = error(M)
    assert all(error(M + 1e-3 * inputs(WIDTH, seed)) > least for seed in range(20))


def test_weights_are_shares():
    values = torch.linalg.eigvals(matrix(inputs(50, 0), inputs(70, 1)))
    assert float(values.imag.abs().max()) < 1e-9
    assert 0 <= float(values.real.min()) <= float(values.real.max()) <= 1


def test_directions_that_one_set_or_neither_set_uses():
    """Axes 0-3: only the forget set. 4-7: only the retain set. 8-11: neither."""
    forget, retain = torch.zeros(40, WIDTH, dtype=torch.float64), torch.zeros(40, WIDTH, dtype=torch.float64)
    forget[:, :4], retain[:, 4:8] = inputs(40, 0, 4), inputs(40, 1, 4)
    M = matrix(forget, retain)
    torch.testing.assert_close(M[4:], torch.zeros(8, WIDTH, dtype=torch.float64))
    assert float(M[:4, 4:].abs().max()) < 1e-9
    assert float(torch.linalg.eigvals(M[:4, :4]).real.max()) > 0.9


def test_the_same_rows_in_both_sets_give_weights_of_at_most_half():
    """Half, or less where the damping, which counts for the retain set, dominates."""
    values = torch.linalg.eigvals(matrix(inputs(50, 0), inputs(50, 0))).real
    assert float(values.max()) == pytest.approx(0.5, rel=5e-3)
    assert float(values.max()) < 0.5


def test_a_rotation_of_the_input_space_turns_the_edit_with_it():
    """Unlike elementwise weights, M does not depend on the basis of the inputs."""
    turn = torch.linalg.qr(inputs(WIDTH, 5)).Q
    forget, retain = inputs(50, 0), inputs(70, 1)
    torch.testing.assert_close(turn @ matrix(forget @ turn, retain @ turn) @ turn.T, matrix(forget, retain))


def test_the_number_of_tokens_does_not_matter():
    forget, retain = inputs(50, 0), inputs(70, 1)
    torch.testing.assert_close(matrix(forget, retain.repeat(3, 1)), matrix(forget, retain))


def test_inputs_that_are_zero_are_not_edited():
    nothing = {"inputs": torch.zeros(WIDTH, WIDTH), "tokens": torch.ones(1, 1)}
    for edit in (torch.ones(3, WIDTH), Product(B=torch.ones(3, 2), A=torch.ones(2, WIDTH))):
        found, left = weigh_input_directions(edit, nothing, nothing)
        assert not (found.A if isinstance(found, Product) else found).any()
        assert left == {"forget": 1.0, "retain": 1.0}


def test_a_product_stays_a_product_of_its_rank_and_the_shares_are_right():
    forget, retain = inputs(50, 0), inputs(70, 1)
    edit = Product(B=torch.randn(7, 2, dtype=torch.float64), A=torch.randn(2, WIDTH, dtype=torch.float64))
    before = edit.A.clone(), edit.B.clone()
    found, left = weigh_input_directions(edit, moments_of(forget), moments_of(retain))
    assert isinstance(found, Product)
    assert found.A.shape == edit.A.shape
    torch.testing.assert_close(found.B @ found.A, (edit.B @ edit.A) @ matrix(forget, retain))
    dense, of_dense = weigh_input_directions(edit.B @ edit.A, moments_of(forget), moments_of(retain))
    torch.testing.assert_close(dense, found.B @ found.A)
    for name, x in (("forget", forget), ("retain", retain)):
        share = (x @ (found.B @ found.A).T).square().sum() / (x @ (edit.B @ edit.A).T).square().sum()
        assert left[name] == pytest.approx(float(share)) == pytest.approx(of_dense[name])
    assert left["retain"] < left["forget"] < 1
    assert all(map(torch.equal, before, (edit.A, edit.B)))


def test_moments_in_single_precision_of_a_steep_spectrum_do_not_break():
    steep = torch.logspace(-8, 4, 80)
    forget, retain = ({k: v.float() for k, v in moments_of(inputs(300, s, 80).float() * steep).items()} for s in (0, 1))
    found, left = weigh_input_directions(torch.randn(5, 80), forget, retain)
    assert bool(torch.isfinite(found).all())
    assert all(0 <= share <= 1 + 1e-4 for share in left.values())


def test_moments_too_steep_for_their_precision_are_refused():
    """Rounding has made the sum indefinite."""
    broken = torch.eye(WIDTH, dtype=torch.float64)
    broken[0, 0], broken[1, 1] = 1.0, -2.0
    bad = {"inputs": broken, "tokens": torch.ones(1, 1)}
    with pytest.raises(NumericalError, match=r"not positive definite, even damped.*input_directions=False"):
        weigh_input_directions(torch.ones(3, WIDTH), bad, bad)


# The moments of a model


def token_moments(model, rows):
    """Layer -> inputs [T, I] and output gradients [T, O] of the tokens with a gradient, one unpadded row at a time."""
    plain, _ = oracles.plain_model(model, [])
    found = {}
    for sample in load_samples(rows, builders.tokenizer()):
        kept, handles = {}, []
        for name, module in plain.named_modules():
            if isinstance(module, oracles.PlainLayer):

                def keep(module, args, output, name=name, kept=kept):
                    output.requires_grad_(True) if output.is_leaf else output.retain_grad()
                    kept[name] = args[0][0].detach(), output

                handles.append(module.register_forward_hook(keep))
        embeddings = plain.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True)))
        oracles.sample_loss(plain, sample.input_ids, sample.labels).backward()
        for handle in handles:
            handle.remove()
        for name, (x, output) in kept.items():
            g = output.grad[0]
            flows = (g != 0).any(1)
            found.setdefault(name, []).append((x[flows], g[flows]))
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}


@pytest.mark.parametrize("statistic", ["mean", "squares"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
# A first token attends to itself alone, and its query has the gradient 0. Fused attention rounds it to 0 or to almost
# 0, as the batch and the processor have it; this kernel gives exactly 0 on every machine.
@sdpa_kernel(SDPBackend.MATH)
def test_moments_are_those_of_all_tokens_that_the_loss_flows_through(kind, batch_size, statistic):
    """Whatever the padding, and for both statistics: only gradients are squared."""
    model = tables.DOUBLES[kind]()
    expected = token_moments(model, builders.forget_rows())
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    collector = Collector(moments=(InputMoments(), Energies()))
    targets = resolve_targets(model, "forget")
    job = Job(model, targets, {"forget": samples}, collector, statistic, show_progress_bar=False)
    found = sweep(job, "forget", batch_size)
    assert set(found) == set(expected)
    for name, (x, g) in expected.items():
        sums = found[name].moments
        torch.testing.assert_close(sums["inputs"], x.T @ x)
        assert float(sums["tokens"]) == len(x)
        torch.testing.assert_close(sums["input energy"][0], x.square().sum(0))
        torch.testing.assert_close(sums["output energy"][0], g.square().sum(0))
        assert found[name].magnitudes() == {}
        assert found[name].gradients == {}
        assert set(sums) == {"inputs", "tokens", "input energy", "output energy"}


@pytest.mark.parametrize("granularity", ["factor", "delta"])
def test_the_emitted_adapter_is_the_edit_along_the_directions(granularity, tmp_path):
    model = builders.adapted_llama()
    without = laws.deltas_of(builders.negate(model, granularity=granularity, rank=64)[1])
    _, state_dict, provenance = builders.negate(model, granularity=granularity, rank=64, input_directions=True)
    forget, retain = (token_moments(model, rows) for rows in (builders.forget_rows(), builders.retain_rows()))
    found = laws.deltas_of(state_dict)
    for layer in provenance.layers:
        C_f, C_r = (
            x[layer.name][0].double().T @ x[layer.name][0].double() / len(x[layer.name][0]) for x in (forget, retain)
        )
        S = C_f + C_r
        M = C_f @ torch.linalg.inv(S + DAMPING * S.diagonal().mean() * torch.eye(len(S)))
        key = next(key for key in found if layer.name in key)
        expected = without[key].double() @ M
        assert float((found[key].double() - expected).norm()) <= 2e-4 * float(expected.norm())
        assert 0 <= layer.left_on_inputs["retain"] < 1


def test_the_default_weighs_directions():
    model = builders.adapted_llama()
    on, off, default = (
        laws.deltas_of(builders.negate(model, input_directions=value)[1]) for value in (True, False, None)
    )
    assert all(torch.equal(on[key], default[key]) for key in on)
    assert not any(torch.equal(on[key], off[key]) for key in on if off[key].any())


def test_experts_go_without_input_directions_and_refuse_them_when_asked():
    model = builders.adapted_mixtral()
    provenance = builders.negate(model, input_directions=None)[2]
    experts = [layer for layer in provenance.layers if "[" in layer.name]
    assert experts
    assert not any(layer.left_on_inputs for layer in experts)
    assert all(layer.left_on_inputs for layer in provenance.layers if "[" not in layer.name)
    for asked in ({"input_directions": True}, {"fit": "second-moment"}):
        with pytest.raises(UnsupportedLayerError, match=r"experts.*unknown for expert parameters"):
            builders.negate(model, **asked)


@pytest.mark.parametrize("fit", tables.FITS)
@pytest.mark.parametrize("granularity", ["delta", "factor"])
def test_every_fit_runs_end_to_end_and_leaves_the_model(fit, granularity, tmp_path):
    model = builders.adapted_llama()
    with laws.untouched(model):
        _, _, provenance = builders.negate(model, granularity=granularity, rank=2, fit=fit, input_directions=None)
    assert all(0 < layer.metric_error < 1 for layer in provenance.layers if layer.edit_norm > 0)
    assert all(0 < layer.energy_kept < 1 for layer in provenance.layers if layer.edit_norm > 0)


def test_uniform_weights_take_no_moments_and_weigh_no_direction():
    model = builders.adapted_llama()
    _, state_dict, _ = builders.negate(model, weighting="uniform", input_directions=True)
    laws.uniform_is_task_arithmetic(laws.deltas_of(state_dict), model, 1.0)
