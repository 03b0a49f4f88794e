"""LLMEraser: what an adapter would be, had rows of its training set been other ones or none.

    delta_Phi = (1/n) (H + damping I)^-1 sum_S [ G(x, y) - G(x + dx, y + dy) ]

with Phi the adapter's factors, n training rows, H the mean curvature of their losses, G a row's loss gradient, S the
rows that change; where a row is erased there is no second term. Losses are mean token losses of completions, in eval
mode.

Reference: Ding et al. 2024, arXiv 2412.00383; solved by conjugate gradients in place of a few steps of Adam.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters import (
    SERVABLE_RANKS,
    EmittedAdapter,
    InfluenceProvenance,
    Product,
    build_adapter,
    describe_base,
    factorize,
    servable_rank,
    versions,
)
from ..data import Sample, fingerprint, spread
from ..errors import ConfigError, DataError, NumericalError
from ..evaluation import losses_of
from ..gradients import progress
from ..model import (
    Target,
    check_base,
    distributed,
    hash_targets,
    require_adapter,
    resolve_layers,
    resolve_targets,
)
from ._packed import differentiable
from ._problem import Pair, Problem, correction, erasure, modification
from ._products import AdapterProducts
from ._solvers import Solution, conjugate_gradients, stochastic
from .settings import InfluenceSettings

_DIAGONAL_SAMPLES = 256  # the preconditioner need not be exact


@dataclass(frozen=True)
class InfluenceResult:
    """A solved change of an adapter.

    Attributes:
        changes: layer name (as ``targets.Target`` has it) -> dA [R, I], dB [O, R].
        report: what was done; ``str`` of it is one line.
    """

    changes: Mapping[str, tuple[Tensor, Tensor]]
    provenance: InfluenceProvenance
    _model: nn.Module = dataclasses.field(repr=False)
    _targets: list[Target] = dataclasses.field(repr=False)

    def edited(self, dtype: torch.dtype = torch.float32) -> EmittedAdapter:
        """The adapter itself, changed: s (B + dB) (A + dA), at its rank; it takes the old one's place."""
        edits = {}
        for target in self._targets:
            dA, dB = self.changes[target.name]
            edits[target.name] = Product(B=target.scaling * (target.B + dB), A=target.A + dA)
        return self._emitted("edited", edits, dtype)

    def difference(self, dtype: torch.dtype = torch.float32) -> EmittedAdapter:
        """An adapter that is stacked on the old one: edited minus original, at twice its rank, exactly.

        s [(B + dB) (A + dA) - B A] = s [(B + dB) dA + dB A] = s [B + dB, dB] [dA; A]

        Raises:
            ConfigError: twice the rank is more than a server takes.
        """
        check_difference(self._targets)
        edits = {}
        for target in self._targets:
            dA, dB = self.changes[target.name]
            B = torch.cat([target.B + dB, dB], dim=1)
            edits[target.name] = Product(B=target.scaling * B, A=torch.cat([dA, target.A]))
        return self._emitted("difference", edits, dtype)

    def _emitted(
        self, form: Literal["edited", "difference"], edits: Mapping[str, Product], dtype: torch.dtype
    ) -> EmittedAdapter:
        factors = {name: factorize(edit, len(edit.A)) for name, edit in edits.items()}
        rank = servable_rank(max(found.rank for found in factors.values()))
        lora_config, state_dict = build_adapter(self._model, factors, rank, dtype)
        name = str(dtype).removeprefix("torch.")
        provenance = dataclasses.replace(self.provenance, form=form, rank=rank, dtype=name)
        return EmittedAdapter(lora_config, state_dict, provenance)


def erase_instances(
    model: nn.Module,
    training_rows: Any,
    erased_rows: Any,
    tokenizer: Any = None,
    *,
    adapter_name: str = "task",
    with_adapters: Sequence[str] = (),
    settings: InfluenceSettings | None = None,
    show_progress_bar: bool = True,
) -> InfluenceResult:
    """The adapter as if these rows, every copy of them, had never been in its training set.

    Args:
        model: carries the adapter, in float or 4 bit; it goes back as it came. Which adapters are active does not
            matter.
        training_rows: all rows that the adapter was trained on: rows, a path to JSON lines, a ``datasets.Dataset`` or a
            dataloader.
        erased_rows: those that must go, likewise.
        tokenizer: needed where data is text.
        adapter_name: the adapter that was trained on them.
        with_adapters: what was on beside it while it was trained.
        settings: curvature, damping, solver; by default ``InfluenceSettings()``.

    Raises:
        AdapterError, UnsupportedLayerError: the adapter cannot be edited, or the model not be differentiated as the
            curvature needs; the message says what to do instead. Before any long computation.
        ConfigError: the model is sharded, an adapter is named twice, or the adapter's rank is more than servers take.
        DataError: a set is malformed; a row to erase is not in the training set, or none would be left; or the adapter
            does not lower the loss on the training set, so that it was not trained on it.
        NumericalError: a loss or product is not finite, or the Hessian is indefinite.

    Reference: arXiv 2412.00383, instance removal.
    """
    settings = settings or InfluenceSettings()
    targets = _checked_adapters(model, adapter_name, with_adapters)
    problem = erasure(training_rows, erased_rows, tokenizer, settings.max_length)
    return _solve("erase_instances", model, targets, problem, adapter_name, with_adapters, settings, show_progress_bar)


def modify_queries(
    model: nn.Module,
    training_rows: Any,
    modified: Sequence[Pair],
    tokenizer: Any,
    *,
    adapter_name: str = "task",
    with_adapters: Sequence[str] = (),
    settings: InfluenceSettings | None = None,
    show_progress_bar: bool = True,
) -> InfluenceResult:
    """The adapter as if these training rows had had other queries.

    Args:
        modified: (row of the training set, the same with another query); completions stay.

    Others, and errors, as for ``erase_instances``; DataError also where a pair changes its completion.

    Reference: arXiv 2412.00383, query modification (dy = 0).
    """
    settings = settings or InfluenceSettings()
    targets = _checked_adapters(model, adapter_name, with_adapters)
    problem = modification(training_rows, modified, tokenizer, settings.max_length)
    return _solve("modify_queries", model, targets, problem, adapter_name, with_adapters, settings, show_progress_bar)


def correct_responses(
    model: nn.Module,
    training_rows: Any,
    corrected: Sequence[Pair],
    tokenizer: Any,
    *,
    adapter_name: str = "task",
    with_adapters: Sequence[str] = (),
    settings: InfluenceSettings | None = None,
    show_progress_bar: bool = True,
) -> InfluenceResult:
    """The adapter as if these training rows had had other completions.

    Args:
        corrected: (row of the training set, the same with another completion); queries stay.

    Others, and errors, as for ``erase_instances``; DataError also where a pair changes its query.

    Reference: arXiv 2412.00383, response correction (dx = 0).
    """
    settings = settings or InfluenceSettings()
    targets = _checked_adapters(model, adapter_name, with_adapters)
    problem = correction(training_rows, corrected, tokenizer, settings.max_length)
    return _solve(
        "correct_responses", model, targets, problem, adapter_name, with_adapters, settings, show_progress_bar
    )


def check_difference(targets: Sequence[Target]) -> None:
    """Refuse a difference adapter of more than a server's rank.

    Raises:
        ConfigError: twice the adapter's rank is more than that.
    """
    rank = 2 * max(target.rank for target in targets)
    if rank > SERVABLE_RANKS[-1]:
        raise ConfigError(
            f"the difference adapter would need rank {rank}, expected at most {SERVABLE_RANKS[-1]}; emit the edited "
            "adapter, which keeps the old one's rank"
        )


def _checked_adapters(model: nn.Module, adapter_name: str, with_adapters: Sequence[str]) -> list[Target]:
    distributed.refuse_sharded(model)
    targets = resolve_targets(model, adapter_name)
    rank = max(target.rank for target in targets)
    if rank > SERVABLE_RANKS[-1]:
        raise ConfigError(
            f"adapter {adapter_name!r} has rank {rank}, expected at most {SERVABLE_RANKS[-1]}, which servers take of "
            "what is emitted"
        )
    for place, name in enumerate(with_adapters):
        if name in (adapter_name, *with_adapters[:place]):
            raise ConfigError(f"with_adapters: expected others than the edited adapter, once each, found {name!r}")
        require_adapter(model, name)
        check_base(model, name)
    return targets


def _solve(
    kind: str,
    model: nn.Module,
    targets: list[Target],
    problem: Problem,
    adapter_name: str,
    with_adapters: Sequence[str],
    settings: InfluenceSettings,
    show_progress_bar: bool,
) -> InfluenceResult:
    start, n = time.perf_counter(), len(problem.training)
    with differentiable(model, [*with_adapters, adapter_name]):
        products = AdapterProducts(model, targets, adapter_name, settings.factors, settings.batch_size)
        products.check(settings.curvature, min(problem.training, key=lambda s: len(s.input_ids)), settings.seed)
    off = losses_of(model, problem.training, adapters=with_adapters, batch_size=settings.batch_size)
    with differentiable(model, [*with_adapters, adapter_name]):
        sets = {"changed": problem.before, "kept": problem.kept, "new": problem.after}
        sets = {name: samples for name, samples in sets.items() if samples}
        before = {name: products.losses(samples, f"the {name} rows") for name, samples in sets.items()}
        _check_trained(torch.cat([found for name, found in before.items() if name != "new"]), off, adapter_name)
        with progress(len(problem.before) + len(problem.after), "gradients", show_progress_bar) as advance:
            b = products.gradient(problem.before, "the rows that change", advance)
            if problem.after:
                b = b - products.gradient(problem.after, "what they become", advance)
        b = b / n
        if not bool(b.any()):
            raise NumericalError("the rows that change have no gradient at all: nothing can be learned from them")
        solution, damping = _solved(products, spread(problem.training, settings.curvature_samples or n), b, settings,
                                    show_progress_bar)  # fmt: skip
        D = solution.vector
        after = {name: products.losses(samples, f"the {name} rows, edited", D) for name, samples in sets.items()}
        changes = _changes(products.changes(D), targets)
    provenance = InfluenceProvenance(
        kind=kind,
        config=settings.to_dict(),
        base_model=describe_base(model),
        adapter={"name": adapter_name, "sha256": hash_targets(targets)},
        with_adapters=[{"name": name, "sha256": hash_targets(resolve_layers(model, name))} for name in with_adapters],
        data={
            name: {"samples": len(samples), "sha256": fingerprint(samples)}
            for name, samples in (("training", problem.training), *sets.items())
        },
        damping=damping,
        residual=solution.residual,
        iterations=solution.iterations,
        stopped=solution.stopped,
        losses={name: [float(found[name].double().mean()) for found in (before, after)] for name in sets},
        versions=versions(),
        seconds={"all": round(time.perf_counter() - start, 3)},
    )
    return InfluenceResult(changes, provenance, model, targets)


def _check_trained(on: Tensor, off: Tensor, adapter_name: str) -> None:
    with_it, without = float(on.double().mean()), float(off.double().mean())
    if not with_it < without:
        raise DataError(
            f"the training set: expected rows that adapter {adapter_name!r} was trained on, so that its loss on them "
            f"is below {without:.3f}, that without it; found {with_it:.3f}. Give the adapter's own training rows, and "
            "in with_adapters what was on beside it"
        )


def _solved(
    products: AdapterProducts, samples: list[Sample], b: Tensor, settings: InfluenceSettings, show_progress_bar: bool
) -> tuple[Solution, float]:
    """D, and the damping as a number."""
    n = len(samples)
    drawn = spread(samples, _DIAGONAL_SAMPLES)
    with progress(len(drawn), "the curvature's diagonal", show_progress_bar) as advance:
        diagonal = products.diagonal(drawn, settings.seed, advance) / len(drawn)
    damping = settings.absolute_damping or settings.damping * float(diagonal.mean(dtype=torch.float64))
    if not damping > 0:
        raise NumericalError(
            "the curvature is zero on the training set: the model is certain of every token, and a share of nothing is "
            "no damping; give absolute_damping"
        )
    diagonal = diagonal + damping

    def apply(vector: Tensor) -> Tensor:
        return products.product(settings.curvature, samples, vector) / n + damping * vector

    shown = show_progress_bar and distributed.is_main()
    with tqdm(total=settings.max_iterations, desc=f"solving ({settings.solver})", disable=not shown) as bar:

        def step(residual: float) -> None:
            bar.set_postfix_str(f"residual {residual:.2g}")
            bar.update()

        limits = {"tolerance": settings.tolerance, "max_iterations": settings.max_iterations}
        if settings.solver == "conjugate-gradients":
            definite = settings.curvature == "gauss-newton"
            return conjugate_gradients(apply, b, diagonal, **limits, step=step, is_definite=definite), damping
        ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
        parts = [ordered[i : i + settings.batch_size] for i in range(0, n, settings.batch_size)]

        def apply_batch(index: int, vector: Tensor) -> Tensor:
            share = len(parts) / n  # the last batch may hold fewer rows
            return products.product(settings.curvature, parts[index], vector) * share + damping * vector

        return stochastic(apply, apply_batch, len(parts), b, diagonal, **limits, seed=settings.seed, step=step), damping


def _changes(parts: Mapping[tuple[int, str], Tensor], targets: Sequence[Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (dA, dB), those of each expert apart; zeros for a factor that is held."""
    found = {}
    for target in targets:
        adapted: Any = target.adapted
        key = id(adapted)
        if target.expert is None:
            dA, dB = (
                parts.get((key, name), torch.zeros_like(held)) for name, held in (("A", target.A), ("B", target.B))
            )
        else:
            whole = parts[key, "B"]
            dA = parts.get((key, "A"), whole.new_zeros(adapted.num_experts * target.rank, target.A.shape[1]))
            dA, dB = target.kind.split(adapted, dA, whole)[target.expert]
        found[target.name] = dA.to(target.A), dB.to(target.B)
    return found
