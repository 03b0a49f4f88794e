"""Methods that edit the task adapter by its own curvature."""

from __future__ import annotations

from ..influence import InfluenceSettings, erase_instances
from ._method import Made, Setup

CURVATURE_SAMPLES, ITERATIONS = 64, 12


# On 20 forget and 40 retain rows, after 8 to 12 products, 0.1, 1, 10 and 100 came to retain losses of 1.02, 0.95, 0.78
# and 0.59 at matched forgetting: the shorter the step, the truer the quadratic.
DAMPING = 100.0


_PRODUCT = 4  # forward passes: a forward derivative is about two, forward and backward are two


def llmeraser(setup: Setup) -> Made:
    """The forget rows erased from the task adapter, as if those of the setup were all its training rows: the difference
    adapter.

    Reference: arXiv 2412.00383.
    """
    rows = [*setup.forget_rows, *setup.retain_rows]
    settings = InfluenceSettings(
        damping=DAMPING, curvature_samples=CURVATURE_SAMPLES, max_iterations=ITERATIONS, seed=setup.seed
    )
    result = erase_instances(
        setup.model, rows, setup.forget_rows, setup.tokenizer, adapter_name="task", settings=settings,
        show_progress_bar=False,
    )  # fmt: skip
    seen = min(CURVATURE_SAMPLES, len(rows))  # of each product, and of its diagonal's two passes
    products = _PRODUCT * (result.provenance.iterations + 1) + 2
    losses = 3  # without the adapter, before and after
    cost = losses + (2 * len(setup.forget_rows) + products * seen) / len(rows)
    lora_config, state_dict, _ = result.difference()
    return Made(lora_config, dict(state_dict), cost)
