"""The linear system (H + damping) D = b of an influence edit: its diagonal, its damping, and its solution."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Sample, spread
from ..errors import NumericalError
from ..gradients import progress
from ..model import distributed
from ._products import AdapterProducts
from ._solvers import LinearSystem, Solution, Stopping, conjugate_gradients, stochastic
from .settings import InfluenceSettings

_DIAGONAL_SAMPLES = 256  # the diagonal only preconditions and scales the damping, so it need not be exact


def solve_system(
    products: AdapterProducts, samples: list[Sample], b: Tensor, settings: InfluenceSettings, show_progress_bar: bool
) -> tuple[Solution, float]:
    """Solve (H + damping) D = b, with H the mean curvature on the samples.

    Returns:
        The solution, and the damping as a number.

    Raises:
        NumericalError: the curvature is zero, a product is not finite, or the matrix is indefinite.
    """
    diagonal = _mean_diagonal(products, samples, settings.seed, show_progress_bar)
    damping = settings.absolute_damping or settings.damping * float(diagonal.mean(dtype=torch.float64))
    if not damping > 0:
        raise NumericalError(
            "the curvature on the training set is zero, because the model is certain of every token, so a damping "
            "relative to it is zero too; set absolute_damping"
        )

    def apply(vector: Tensor) -> Tensor:
        return products.product(settings.curvature, samples, vector) / len(samples) + damping * vector

    system = LinearSystem(apply, b, diagonal + damping)
    shown = show_progress_bar and distributed.is_main()
    with tqdm(total=settings.max_iterations, desc=f"solving ({settings.solver})", disable=not shown) as bar:

        def on_product(residual: float) -> None:
            bar.set_postfix_str(f"residual {residual:.2g}")
            bar.update()

        stopping = Stopping(settings.tolerance, settings.max_iterations, on_product)
        if settings.solver == "conjugate-gradients":
            is_definite = settings.curvature == "gauss-newton"
            return conjugate_gradients(system, stopping, is_definite=is_definite), damping
        return _solve_in_batches(products, samples, system, stopping, settings, damping), damping


def _mean_diagonal(products: AdapterProducts, samples: list[Sample], seed: int, show_progress_bar: bool) -> Tensor:
    """The Gauss-Newton matrix's diagonal [P], estimated on evenly spaced samples."""
    chosen = spread(samples, _DIAGONAL_SAMPLES)
    with progress(len(chosen), "the curvature's diagonal", show_progress_bar) as advance:
        return products.diagonal(chosen, seed, advance) / len(chosen)


def _solve_in_batches(
    products: AdapterProducts,
    samples: list[Sample],
    system: LinearSystem,
    stopping: Stopping,
    settings: InfluenceSettings,
    damping: float,
) -> Solution:
    by_length = sorted(samples, key=lambda sample: len(sample.input_ids))
    parts = [by_length[start : start + settings.batch_size] for start in range(0, len(samples), settings.batch_size)]
    factor = len(parts) / len(samples)  # the same for all: the last batch may hold fewer rows

    def apply_batch(index: int, vector: Tensor) -> Tensor:
        return products.product(settings.curvature, parts[index], vector) * factor + damping * vector

    return stochastic(system, stopping, apply_batch=apply_batch, batches=len(parts), seed=settings.seed)
