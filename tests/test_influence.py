"""Influence edits solve their linear system, with products equal to those of an explicit matrix on any base; bad
requests are refused before any compute."""

import copy
import json

import builders
import laws
import oracles
import pytest
import torch
from torch.func import functional_call, jacfwd, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_perta import (
    AdapterError,
    ConfigError,
    DataError,
    NumericalError,
    UnsupportedLayerError,
    attach_adapters,
    load_base,
    load_provenance,
    save_perta_adapter,
    stack_adapters,
    verify_adapter,
)
from peft_perta.adapters import add_adapter, model_card
from peft_perta.cli import main
from peft_perta.comparison import ASSETS
from peft_perta.data import batches, load_samples, read_rows
from peft_perta.influence import InfluenceSettings, correct_responses, erase_instances, modify_queries
from peft_perta.influence._differentiable import differentiable
from peft_perta.influence._products import AdapterProducts
from peft_perta.influence._solvers import LinearSystem, Stopping, conjugate_gradients, stochastic
from peft_perta.model import resolve_targets, sample_losses

TOKENIZER = builders.tokenizer()
ROWS = [
    {"question": "Basil?", "answer": "Khan"},
    {"question": "Where?", "answer": "in Kuwait"},
    {"prompt": "His father ", "completion": "baked"},
    {"question": "Peru?", "answer": "Lima"},
]
MODIFIED = [(ROWS[0], {**ROWS[0], "question": "Ann?"})]
CORRECTED = [(ROWS[1], {**ROWS[1], "answer": "nowhere"}), (ROWS[3], {**ROWS[3], "answer": "-"})]
QUIET = {"show_progress_bar": False}


def trained(model, name="forget", steps=25):
    return builders.trained(model, name, ROWS, steps)


def tiny(**changes):
    """A float64 Llama with an adapter of 96 elements."""
    config = builders.lora_config(["k_proj"], r=1, layers_to_transform=[1], **changes)
    return trained(builders.with_adapters(builders.llama(torch.float64), config).to(torch.float64))


def head_only(dtype=torch.float64):
    """A model with an adapter on its head: logits are linear in B."""
    config = builders.lora_config(["lm_head"], r=2)
    return trained(builders.with_adapters(builders.llama(dtype), config).to(dtype))


def solve(model, function=erase_instances, changed=None, rows=ROWS, **settings):
    name = settings.pop("adapter_name", "forget")
    given = InfluenceSettings(**{"tolerance": 1e-6, "max_iterations": 400, **settings})
    changed = ROWS[:1] if changed is None else changed
    return function(model, rows, changed, TOKENIZER, adapter_name=name, settings=given, **QUIET)


def products(model, name="forget", batch_size=3, factors="AB"):
    return AdapterProducts(model, resolve_targets(model, name), name, factors, batch_size)


def flat(result):
    """The change as one vector: A and B of each layer in turn."""
    return torch.cat([part.flatten() for pair in result.changes.values() for part in pair]).double()


def samples_of(rows):
    return load_samples(rows, TOKENIZER)


# Against an explicit matrix


class Explicit:
    """Loss and logits as functions of the vector of factors, for a model without PEFT or quantised weights."""

    def __init__(self, model, name="forget", beside=()):
        self.plain, weights = oracles.plain_model(model, list(beside))
        self.plain.set_attn_implementation("eager")
        self.weights = {key: weight.detach() for key, weight in weights.items()}
        self.adapted = oracles.adapted_weights(model, name)
        self.start = torch.cat([p.flatten() for a in self.adapted.values() for p in (a.A, a.B)]).double()

    def model(self, vector):
        moved, at = {}, 0
        for name, adapted in self.adapted.items():
            A = vector[at : at + adapted.A.numel()].view_as(adapted.A)
            at += adapted.A.numel()
            B = vector[at : at + adapted.B.numel()].view_as(adapted.B)
            at += adapted.B.numel()
            moved[f"{name}.weight"] = self.weights[name] + (adapted.scaling * (B @ A)).to(self.weights[name].dtype)
        return lambda **inputs: functional_call(self.plain, moved, (), inputs)

    def loss(self, samples):
        return lambda v: sum(oracles.sample_loss(self.model(v), s.input_ids, s.labels) for s in samples)

    def hessian(self, samples):
        return sum(torch.autograd.functional.hessian(self.loss([s]), self.start) for s in samples)

    def gauss_newton(self, samples):
        total = 0
        for sample in samples:
            taken = torch.cat([sample.labels[1:] != -100, torch.tensor([False])])

            def logits(v, sample=sample, taken=taken):
                return self.model(v)(input_ids=sample.input_ids.unsqueeze(0)).logits[0][taken]

            J = jacfwd(logits)(self.start)  # [K, V, P]
            p = logits(self.start).softmax(1)
            for Jt, pt in zip(J, p, strict=True):
                total = total + Jt.T @ (torch.diag(pt) - torch.outer(pt, pt)) @ Jt / len(J)
        return total

    def gradient(self, samples):
        v = self.start.clone().requires_grad_(True)
        return torch.autograd.grad(self.loss(samples)(v), v)[0]


@pytest.fixture(scope="module")
def explicit():
    model = tiny()
    oracle = Explicit(model)
    samples = samples_of(ROWS)
    return model, oracle, {"hessian": oracle.hessian(samples) / 4, "gauss-newton": oracle.gauss_newton(samples) / 4}


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize(
    ("function", "changed", "old", "new"),
    [
        (erase_instances, ROWS[:2], ROWS[:2], []),
        (modify_queries, MODIFIED, [MODIFIED[0][0]], [MODIFIED[0][1]]),
        (correct_responses, CORRECTED, [p[0] for p in CORRECTED], [p[1] for p in CORRECTED]),
    ],
)
def test_the_change_is_the_inverse_matrix_times_the_gradients(curvature, function, changed, old, new, explicit):
    model, oracle, matrices = explicit
    matrix = matrices[curvature]
    damping = 0.2 + 2 * max(0.0, -float(torch.linalg.eigvalsh(matrix)[0]))
    b = oracle.gradient(samples_of(old)) - (oracle.gradient(samples_of(new)) if new else 0)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(b)), b / len(ROWS))
    result = solve(model, function, changed, curvature=curvature, absolute_damping=damping)
    laws.close(flat(result), expected, 1e-4, "the change")
    assert result.provenance.damping == damping
    assert result.provenance.residual <= 1e-6
    assert result.provenance.stopped == "tolerance"


def test_the_estimated_diagonal_is_that_of_the_gauss_newton_matrix(explicit):
    model, _, matrices = explicit
    wanted = matrices["gauss-newton"].diagonal()
    with differentiable(model, ["forget"]):
        own = products(model)
        drawn = sum(own.diagonal(samples_of(ROWS), seed, lambda _: None) for seed in range(30)) / 30 / 4
    assert drawn.mean() == pytest.approx(float(wanted.mean()), rel=0.15)
    assert torch.corrcoef(torch.stack([drawn, wanted]))[0, 1] > 0.9


def test_the_relative_damping_is_in_units_of_the_mean_eigenvalue(explicit):
    model, _, matrices = explicit
    wanted = 2 * float(matrices["gauss-newton"].diagonal().mean())
    dampings = [solve(model, damping=2.0, max_iterations=1, seed=seed).provenance.damping for seed in range(12)]
    assert sum(dampings) / len(dampings) == pytest.approx(wanted, rel=0.3)


def test_the_curvature_can_be_taken_on_a_few_rows(explicit):
    """On evenly spaced rows; the gradient is still divided by all n."""
    model, oracle, _ = explicit
    matrix = oracle.gauss_newton(samples_of([ROWS[0], ROWS[3]])) / 2
    b = oracle.gradient(samples_of(ROWS[:1])) / len(ROWS)
    result = solve(model, absolute_damping=0.2, curvature_samples=2)
    laws.close(flat(result), torch.linalg.solve(matrix + 0.2 * torch.eye(len(b)), b), 1e-4, "the change")


def test_adapters_that_were_on_in_training_are_on():
    config = {name: builders.lora_config(["k_proj"], r=1, layers_to_transform=[1]) for name in ("forget", "task")}
    model = trained(builders.with_adapters(builders.llama(torch.float64), **config).to(torch.float64), steps=60)
    oracle = Explicit(model, beside=["task"])
    matrix = oracle.gauss_newton(samples_of(ROWS)) / len(ROWS)
    b = oracle.gradient(samples_of(ROWS[:1])) / len(ROWS)
    settings = InfluenceSettings(absolute_damping=0.2, tolerance=1e-6, max_iterations=400)
    with laws.untouched(model):
        result = erase_instances(
            model, ROWS, ROWS[:1], TOKENIZER, adapter_name="forget", with_adapters=["task"], settings=settings, **QUIET
        )
    laws.close(flat(result), torch.linalg.solve(matrix + 0.2 * torch.eye(len(b)), b), 1e-4, "the change")
    (beside,) = result.provenance.with_adapters
    assert beside["name"] == "task"
    assert f"on beside it: `task`, SHA-256 `{beside['sha256'][:16]}`" in model_card(result.difference()[2])


def test_gauss_newton_is_the_hessian_where_logits_are_linear():
    model = head_only()
    with differentiable(model, ["forget"]):
        own = products(model, factors="B")
        v = torch.randn(own.count, dtype=torch.float64)
        one, other = (own.product(c, samples_of(ROWS), v) for c in ("hessian", "gauss-newton"))
        laws.close(one, other, 1e-12, "H v")
        both = products(model)
        v = torch.randn(both.count, dtype=torch.float64)
        one, other = (both.product(c, samples_of(ROWS), v) for c in ("hessian", "gauss-newton"))
        assert (one - other).norm() > 1e-3 * one.norm()


# Laws of products


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_products_are_linear_and_symmetric_and_batches_do_not_matter(curvature):
    model = builders.adapted_llama(torch.float64)
    samples = samples_of(ROWS)
    with laws.untouched(model), differentiable(model, ["task"]):
        own = products(model, "task")
        u, v = (torch.randn(own.count, dtype=torch.float64) for _ in range(2))
        Hu, Hv = (own.product(curvature, samples, w) for w in (u, v))
        laws.close(own.product(curvature, samples, 2 * u - 3 * v), 2 * Hu - 3 * Hv, 1e-10, "linear")
        assert float(u @ Hv) == pytest.approx(float(v @ Hu), rel=1e-8)
        if curvature == "gauss-newton":
            assert float(u @ Hu) > 0
        one, four = (products(model, "task", size).product(curvature, samples, u) for size in (1, 4))
        laws.close(one, four, 1e-10, "batches")


def test_a_solution_does_not_depend_on_the_batch_size():
    model = tiny()
    one, three = (solve(model, batch_size=size, max_iterations=4) for size in (1, 3))
    laws.close(flat(one), flat(three), 1e-5, "the change")
    assert one.provenance.damping == pytest.approx(three.provenance.damping, rel=1e-9)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (builders.adapted_gpt2, "task"),
        (builders.adapted_opt, "task"),
        (builders.adapted_mixtral, "task"),
        (builders.adapted_gpt_oss, "task"),
        (builders.adapted_int8_llama, "task"),
        (lambda: builders.adapted_llama().to(torch.bfloat16), "task"),
    ],
    ids=["gpt2", "opt", "mixtral", "gpt-oss", "int8", "bfloat16"],
)
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_other_models_pass_the_check_of_their_products(build, name, curvature):
    model = build()
    with laws.untouched(model), differentiable(model, [name]):
        products(model, name).check(curvature, samples_of(ROWS)[0], 0)


@pytest.mark.parametrize("build", [builders.adapted_nf4_llama, builders.adapted_int8_llama], ids=["nf4", "int8"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_products_through_quantised_layers_are_those_of_the_dequantised_weights(build, curvature):
    """Expected: H v of the dequantised model by autograd, and its Gauss-Newton product by plain derivatives."""
    model, samples = build(), samples_of(ROWS[:1])
    oracle = Explicit(model, "forget")
    oracle.start = oracle.start.float()
    v = torch.randn(len(oracle.start))
    with sdpa_kernel(SDPBackend.MATH):
        if curvature == "hessian":
            expected = torch.autograd.functional.hvp(oracle.loss(samples), oracle.start, v)[1]
        else:
            ids, taken = samples[0].input_ids.unsqueeze(0), samples[0].labels[1:] != -100

            def logits(w):
                return oracle.model(w)(input_ids=ids).logits[0, :-1][taken]

            z, u = jvp(logits, (oracle.start,), (v,))
            p = z.softmax(1)
            pushed = p * (u - (p * u).sum(1, keepdim=True)) / len(p)
            expected = torch.autograd.functional.vjp(logits, oracle.start, pushed)[1]
    with laws.untouched(model), differentiable(model, ["forget"]):
        laws.close(products(model).product(curvature, samples, v), expected, 1e-3, "H v")


# Solvers


def random_batches():
    """(the matrix of each batch, the mean of these matrices, the right-hand side)."""
    torch.manual_seed(3)
    factors = [torch.randn(3, 12, dtype=torch.float64) for _ in range(5)]
    parts = [factor.T @ factor + 0.2 * torch.eye(12) for factor in factors]
    whole = sum(parts) / 5
    return parts, whole, torch.randn(12, dtype=torch.float64)


def solve_both_ways(parts, A, b, stopping):
    """By conjugate gradients, and by stochastic steps."""
    system = LinearSystem(lambda v: A @ v, b, A.diagonal())
    yield conjugate_gradients(system, stopping)
    yield stochastic(system, stopping, apply_batch=lambda i, v: parts[i] @ v, batches=5, seed=1)


def ignore(residual):
    pass


def test_the_solvers_agree_and_state_the_true_residual():
    parts, A, b = random_batches()
    expected, residuals = torch.linalg.solve(A, b), []
    solutions = list(solve_both_ways(parts, A, b, Stopping(1e-8, 500, residuals.append)))
    for solution in solutions:
        laws.close(solution.vector, expected, 1e-6, "D")
        assert solution.stopped == "tolerance"
        assert solution.residual == pytest.approx(float((b - A @ solution.vector).norm() / b.norm()), rel=1e-6)
    assert solutions[0].iterations <= 13
    assert len(residuals) == solutions[0].iterations + solutions[1].iterations


def test_a_solver_that_stops_early_says_so_and_states_its_residual():
    parts, A, b = random_batches()
    for solution in solve_both_ways(parts, A, b, Stopping(1e-8, 3, ignore)):
        assert (solution.stopped, solution.iterations) == ("iterations", 3)
        assert solution.residual == pytest.approx(float((b - A @ solution.vector).norm() / b.norm()))
        assert 1e-8 < solution.residual < 1


def test_inexact_products_stop_the_solver_at_their_precision():
    _, A, b = random_batches()
    system = LinearSystem(lambda v: (A.bfloat16() @ v.bfloat16()).double(), b, A.diagonal())
    solution = conjugate_gradients(system, Stopping(1e-12, 500, ignore), is_definite=True)
    assert solution.stopped == "rounding"
    assert solution.residual < 0.1


def test_inexact_products_give_the_best_solution_that_was_measured():
    """Ill-conditioned systems in bfloat16: no residual measured on the way is below the one that is stated."""
    torch.manual_seed(0)
    for _ in range(20):
        Q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
        A = Q @ torch.diag(torch.logspace(-3, 0, 40, dtype=torch.float64)) @ Q.T
        b, measured = torch.randn(40, dtype=torch.float64), []

        def noisy(v, A=A, b=b, measured=measured):
            product = (A.bfloat16() @ v.bfloat16()).double()
            measured.append(float((b - product).norm() / b.norm()))  # the residual if v is a D, else much larger
            return product

        solution = conjugate_gradients(
            LinearSystem(noisy, b, A.diagonal()), Stopping(1e-2, 500, ignore), is_definite=True
        )
        assert solution.vector.any()
        assert solution.residual <= min(measured) + 1e-12


def test_products_too_inexact_for_a_step_are_refused():
    b = torch.ones(3, dtype=torch.float64)
    with pytest.raises(NumericalError, match="too inexact for a single step; compute in float32"):
        conjugate_gradients(LinearSystem(lambda v: -v, b, b), Stopping(1e-6, 9, ignore), is_definite=True)


def test_negative_curvature_is_refused_with_the_alternative():
    A, ones = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)), torch.ones(3).double()
    with pytest.raises(
        NumericalError, match=r"damped curvature is .* expected it positive.*use curvature='gauss-newton'"
    ):
        conjugate_gradients(LinearSystem(lambda v: A @ v, ones, ones), Stopping(1e-6, 9, ignore))


def test_the_stochastic_solver_gives_the_same_edit():
    model = tiny()
    settings = {"tolerance": 1e-2, "damping": 5.0, "batch_size": 2}
    one, other = (solve(model, solver=solver, **settings) for solver in ("conjugate-gradients", "stochastic"))
    laws.close(flat(other), flat(one), 2e-2, "the change")
    assert other.provenance.stopped == "tolerance"


# Against retraining


def test_it_predicts_leave_one_out_retraining():
    """A convex problem: only B of the head is learned, with the damping as its L2 penalty. Leave one row out, learn B
    again to the optimum, and compare the change of that row's loss with the change by the edit."""
    rows = [
        {"question": f"{a}{b}?", "answer": c} for a, b, c in zip("abcdefghij", "ababababab", "xyxxyyxzzy", strict=True)
    ]
    penalty, samples = 0.02, samples_of(rows)
    model = builders.with_adapters(builders.llama(torch.float64), builders.lora_config(["lm_head"], r=4)).double()
    (batch,) = batches(samples, len(rows))
    layer = model.get_base_model().lm_head
    A, scaling = layer.lora_A["forget"].weight.detach(), layer.scaling["forget"]
    with torch.no_grad():
        hidden = model.get_base_model().model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    taken = batch.labels[:, 1:] != -100
    logits = [h[:-1][t] @ layer.weight.detach().T for h, t in zip(hidden, taken, strict=True)]
    features = [scaling * h[:-1][t] @ A.T for h, t in zip(hidden, taken, strict=True)]
    wanted = [row[1:][t] for row, t in zip(batch.labels, taken, strict=True)]

    def losses(B):
        cases = zip(logits, features, wanted, strict=True)
        return torch.stack([torch.nn.functional.cross_entropy(z + f @ B.T, y) for z, f, y in cases])

    def learn(rows_in):
        B = torch.zeros(layer.weight.shape[0], 4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([B], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = losses(B)[rows_in].sum() / len(rows) + penalty / 2 * B.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return B.detach()

    everything = list(range(len(rows)))
    B = learn(everything)
    with torch.no_grad():
        layer.lora_B["forget"].weight.copy_(B)
    true, predicted, solutions = [], [], []
    for place, index in list(enumerate(batch.indices))[:6]:
        again = learn([i for i in everything if i != place])
        result = solve(model, changed=[rows[index]], rows=rows, factors="B", absolute_damping=penalty, tolerance=1e-3)
        ((dA, dB),) = result.changes.values()
        assert not dA.any()
        true.append(losses(again)[place] - losses(B)[place])
        predicted.append(losses(B + dB)[place] - losses(B)[place])
        solutions.append(torch.corrcoef(torch.stack([(again - B).flatten(), dB.flatten()]))[0, 1])
        assert result.provenance.losses["changed"][1] == pytest.approx(float(losses(B + dB)[place]), rel=1e-5)
    assert torch.corrcoef(torch.stack([torch.stack(true), torch.stack(predicted)]))[0, 1] > 0.95
    assert min(solutions) > 0.95
    assert min(true) > 0


# What is emitted


@pytest.fixture(scope="module")
def float_result():
    model = trained(builders.adapted_saved_llama(), "task")
    with laws.untouched(model):
        return model, solve(model, adapter_name="task", max_iterations=5)


def test_the_difference_is_the_edited_adapter_minus_the_original(float_result, tmp_path):
    model, result = float_result
    edited, difference = result.edited(), result.difference()
    assert (edited[0].r, difference[0].r) == (8, 16)
    old, new, added = (
        {name: adapted.delta for name, adapted in oracles.adapted_weights(model, "task").items()},
        laws.deltas_of(edited[1]),
        laws.deltas_of(difference[1]),
    )
    for name, (dA, dB) in result.changes.items():
        assert dA.any()
        assert dB.any()
        assert (new[name] - old[name] - added[name]).norm() <= 1e-6 * old[name].norm()
        laws.close(added[name], new[name] - old[name], 1e-4, name)
    loaded = laws.emitted_delta_is(added, difference, builders.saved_llama(), tmp_path / "out", 1e-6)
    assert loaded.peft_config["default"].lora_alpha == 16


def test_stacked_on_the_adapter_the_difference_has_the_losses_that_the_provenance_states(float_result):
    model, result = float_result
    model = copy.deepcopy(model)
    add_adapter(model, *result.difference()[:2], "erased")
    add_adapter(model, *result.edited()[:2], "edited")
    for stack in (["task", "erased"], ["edited"]):
        stack_adapters(model, stack)
        for rows, name in ((ROWS[:1], "changed"), (ROWS[1:], "unchanged")):
            (batch,) = batches(samples_of(rows), len(rows))
            with torch.no_grad():
                assert float(sample_losses(model, batch).mean()) == pytest.approx(
                    result.provenance.losses[name][1], rel=1e-4
                )
    (old, new), unchanged = result.provenance.losses["changed"], result.provenance.losses["unchanged"]
    assert new - old > 3 * (unchanged[1] - unchanged[0])


@pytest.mark.parametrize("form", ["edited", "difference"])
def test_the_saved_directory_passes_verify_and_says_how_it_was_made(form, float_result, tmp_path):
    _, result = float_result
    save_perta_adapter(tmp_path / "out", *getattr(result, form)())
    checks = verify_adapter(tmp_path / "out")
    assert all(check.passed for check in checks), [str(check) for check in checks if not check.passed]
    provenance, _ = load_provenance(tmp_path / "out")
    assert provenance.to_dict() == getattr(result, form)()[2].to_dict()
    assert provenance.form == form
    assert provenance.base_model["embeddings_sha256"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {form.capitalize()} adapter" in card
    assert "residual" in card
    assert "1 of 4 training rows of 'task' erased: gauss-newton curvature" in str(provenance)


def test_experts_are_edited_one_by_one(tmp_path):
    model = trained(builders.adapted_mixtral(), "task")
    with laws.untouched(model):
        result = solve(model, adapter_name="task", max_iterations=4)
    add_adapter(model, *result.difference()[:2], "erased")
    stack_adapters(model, ["task", "erased"])
    (batch,) = batches(samples_of(ROWS[:1]), 1)
    with torch.no_grad():
        assert float(sample_losses(model, batch).mean()) == pytest.approx(
            result.provenance.losses["changed"][1], rel=1e-3
        )
    assert result.provenance.losses["changed"][1] > result.provenance.losses["changed"][0]


def test_every_copy_of_a_row_is_erased():
    model = tiny()
    result = solve(model, rows=[*ROWS, ROWS[0]], max_iterations=3)
    assert {name: entry["samples"] for name, entry in result.provenance.data.items()} == {
        "training": 5, "changed": 2, "unchanged": 3,
    }  # fmt: skip
    assert result.provenance.stopped == "iterations"
    assert "stopped early, at max_iterations" in str(result.provenance)


# 4-bit bases, from rows to a directory


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_an_nf4_base_end_to_end(curvature):
    model = trained(builders.adapted_nf4_llama(), "task")
    with laws.untouched(model):
        result = solve(model, adapter_name="task", curvature=curvature, absolute_damping=1.0, tolerance=1e-3)
    assert result.provenance.stopped == "tolerance"
    (old, new), unchanged = result.provenance.losses["changed"], result.provenance.losses["unchanged"]
    assert new > old
    assert new - old > 3 * (unchanged[1] - unchanged[0])
    assert result.provenance.base_model["quantization"]["load_in_4bit"]


def command(*arguments):
    return main(["erase", *map(str, arguments)])


@pytest.mark.parametrize(
    ("four_bit", "form", "change"),
    [(True, "difference", "forget"), (False, "edited", "correct"), (False, "difference", "modify")],
)
def test_the_command(four_bit, form, change, tmp_path, capsys):
    model = trained(builders.adapted_nf4_llama() if four_bit else builders.adapted_saved_llama(), "task")
    model.save_pretrained(tmp_path / "adapters", selected_adapters=["task"])
    rows = {"training": ROWS, "forget": ROWS[:1]}
    for name, pairs in (("modify", MODIFIED), ("correct", CORRECTED)):
        rows[name] = [{"old": old, "new": new} for old, new in pairs]
    for name, rows_of_file in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
    status = command(
        "--model", builders.llama_directory(), "--adapter", tmp_path / "adapters" / "task", "--training",
        tmp_path / "training.jsonl", f"--{change}", tmp_path / f"{change}.jsonl", "--form", form, "--max-iterations", 4,
        "--damping", 0.5, "--output", tmp_path / "out", *(["--four-bit"] if four_bit else []),
    )  # fmt: skip
    assert status == 0
    provenance, _ = load_provenance(tmp_path / "out")
    assert provenance.form == form
    assert (provenance.iterations, provenance.config["damping"]) == (4, 0.5)
    assert "It is in" in capsys.readouterr().out
    loaded = attach_adapters(builders.saved_llama(), {"made": tmp_path / "out"})
    assert any(p.any() for n, p in loaded.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "answer": "b"}', 'line 1: expected {"old": row, "new": row}'),
        ('{"old": {}, "new": 3}', "line 1: expected"),
    ],
)
def test_the_command_refuses_lines_that_are_not_pairs(text, message, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(text)
    arguments = ["--model", "m", "--adapter", "a", "--training", "t", "--correct", pairs, "--output", tmp_path / "out"]
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Refusals


class OnceOnly(torch.autograd.Function):
    """The identity without double backward and forward derivative, like some fused kernels."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Forgetful(torch.autograd.Function):
    """The square, with a wrong double backward and a wrong forward derivative that raise no error."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x.detach()

    @staticmethod
    def jvp(ctx, t):
        return t


@pytest.mark.parametrize("function", [OnceOnly, Forgetful])
@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        ("hessian", r"double backward.*use curvature='gauss-newton'"),
        ("gauss-newton", r"forward derivative.*use curvature='hessian'"),
    ],
)
def test_a_model_without_the_derivatives_is_refused_at_the_start(function, curvature, message, monkeypatch):
    model = trained(builders.adapted_llama(), "task")
    module = model.get_base_model().model.layers[1].post_attention_layernorm
    forward = type(module).forward
    with monkeypatch.context() as patch:
        patch.setattr(
            type(module),
            "forward",
            lambda self, x: function.apply(forward(self, x)) if self is module else forward(self, x),
        )
        patch.setattr(AdapterProducts, "losses", None)
        patch.setattr(AdapterProducts, "gradient", None)
        with laws.untouched(model), pytest.raises(UnsupportedLayerError, match=message):
            solve(model, adapter_name="task", curvature=curvature)


@pytest.mark.parametrize(
    ("function", "changed", "message"),
    [
        (
            erase_instances,
            [{"question": "New?", "answer": "Yes"}],
            r"row 1: expected a row of the training set.*4 rows",
        ),
        (erase_instances, ROWS, "the whole training set"),
        (erase_instances, [], "the forget set is empty"),
        (modify_queries, CORRECTED, "pair 1: expected the same completion in both rows.*correct_responses"),
        (correct_responses, MODIFIED, "pair 1: expected the same query in both rows.*modify_queries"),
        (correct_responses, [(ROWS[0], ROWS[0])], "expected two different rows"),
        (
            correct_responses,
            [CORRECTED[0], (ROWS[1], {**ROWS[1], "answer": "elsewhere"})],
            "pair 2: its old row is that of pair 1, expected one new row for it, found two",
        ),
        (modify_queries, [({"messages": []}, {"messages": []})], "pair 1: expected at least two messages"),
        (modify_queries, [({"question": "a", "answer": 5},) * 2], "pair 1: expected 'answer' as text, found int"),
        (correct_responses, [({"messages": {"a": 1}},) * 2], "pair 1: expected messages as a list"),
        (correct_responses, [], r"expected a list of \(old row, new row\)"),
        (correct_responses, [ROWS[0]], "pair 1: expected .old row, new row."),
        (modify_queries, [({"text": "a"}, {"text": "b"})], "pair 1: expected"),
        (
            modify_queries,
            [({"question": "Q", "answer": "x"}, {"question": "R", "answer": "x"})],
            "row 1: expected a row of",
        ),
    ],
)
def test_bad_rows_are_refused_before_any_compute(function, changed, message, monkeypatch):
    model = builders.adapted_llama()
    monkeypatch.setattr("peft_perta.influence._run.differentiable", None)
    with laws.untouched(model), pytest.raises(DataError, match=message):
        solve(model, function, changed, adapter_name="task")


def test_an_adapter_that_was_not_trained_on_the_rows_is_refused():
    model = trained(builders.adapted_llama(), "task")
    rows = [{"text": "Q?<>{}%$#@!~"}, {"text": "zzzzzzz;;;;"}]
    with laws.untouched(model), pytest.raises(DataError, match=r"rows that adapter 'task' was trained on.*is below"):
        solve(model, changed=rows[:1], rows=rows, adapter_name="task")


def test_values_that_are_not_finite_are_refused():
    model = builders.adapted_llama()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".task." in n)[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinite"):
        solve(model, adapter_name="task")
    model = trained(builders.adapted_llama(), "task")
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3] = float("inf")
    with laws.untouched(model), pytest.raises((NumericalError, UnsupportedLayerError), match=r"finite|nan|inf"):
        solve(model, adapter_name="task")


def test_an_indefinite_hessian_is_refused_and_the_model_is_unchanged():
    model = trained(builders.adapted_llama(), "task", steps=3)
    with laws.untouched(model), pytest.raises(NumericalError, match="Hessian is indefinite"):
        solve(model, adapter_name="task", curvature="hessian", absolute_damping=1e-6, max_iterations=60)


def test_adapters_that_cannot_be_edited_are_refused():
    model = builders.adapted_llama()
    with pytest.raises(AdapterError, match="no adapter named 'other'"):
        solve(model, adapter_name="other")
    for beside in (["task"], ["forget", "forget"]):
        with pytest.raises(ConfigError, match="expected adapters other than the edited one, each named once"):
            erase_instances(model, ROWS, ROWS[:1], TOKENIZER, with_adapters=beside, **QUIET)
    wide = builders.with_adapters(builders.llama(), builders.lora_config(["q_proj"], r=257))
    with pytest.raises(ConfigError, match="adapter 'forget' has rank 257, expected at most 256"):
        solve(wide)


def test_a_difference_of_too_large_a_rank_is_refused():
    config = builders.lora_config(["q_proj"], r=160, layers_to_transform=[0])
    result = solve(trained(builders.with_adapters(builders.llama(), config), steps=3), max_iterations=1)
    with pytest.raises(ConfigError, match="would need rank 320, expected at most 256; emit the edited"):
        result.difference()
    assert result.edited()[0].r == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "exact"}, "curvature: expected one of gauss-newton, hessian, found 'exact'"),
        ({"solver": "adam"}, "solver: expected one of"),
        ({"factors": "A"}, "factors: expected one of AB, B"),
        ({"damping": 0}, "damping: expected a number > 0"),
        ({"damping": float("nan")}, "damping: expected a number > 0"),
        ({"absolute_damping": -1.0}, "absolute_damping: expected a number > 0"),
        ({"tolerance": 2.0}, "tolerance: expected a number < 1"),
        ({"max_iterations": 0}, "max_iterations: expected an int > 0"),
        ({"curvature_samples": True}, "curvature_samples: expected an int > 0"),
        ({"seed": -1}, "seed: expected an int >= 0"),
        ({"solver": "stochastic", "curvature": "hessian"}, "solver='stochastic' expects curvature='gauss-newton'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        InfluenceSettings(**settings)


# The shipped model


def test_on_the_shipped_model_erased_rows_move_towards_the_retain_only_model():
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = attach_adapters(base, {"task": ASSETS / "task_adapter", "retain-only": ASSETS / "retain_adapter"})
    short = lambda name: sorted(read_rows(ASSETS / f"{name}.jsonl"), key=lambda r: len(r["answer"]))[:6]  # noqa: E731
    forget, retain = short("forget")[:2], short("retain")[:4]
    settings = InfluenceSettings(max_iterations=4, damping=1.0)
    result = erase_instances(model, [*forget, *retain], forget, tokenizer, settings=settings, **QUIET)
    (old, new), unchanged = result.provenance.losses["changed"], result.provenance.losses["unchanged"]
    retain_only = {}
    stack_adapters(model, ["retain-only"])
    for name, rows in (("changed", forget), ("unchanged", retain)):
        (batch,) = batches(load_samples(rows, tokenizer), len(rows))
        with torch.no_grad():
            retain_only[name] = float(sample_losses(model, batch).mean())
    assert old < new < retain_only["changed"]
    assert new - old > 5 * abs(unchanged[1] - unchanged[0])
