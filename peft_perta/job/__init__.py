"""One job, one command: from rows that must go to an adapter with its evidence.

A recipe says everything; its steps are those of the single commands, and each is kept once it is done.

Imports from: errors, data, model, gradients, evaluation, adapters, perta, training, html_report, comparison.
"""

from .recipe import RECIPE_NAME, Recipe, Request, read_recipe, recipe_of
from .recommendation import RECOMMENDATIONS, recommend
from .run import OUTPUT, Job

__all__ = [
    "OUTPUT",
    "RECIPE_NAME",
    "RECOMMENDATIONS",
    "Job",
    "Recipe",
    "Request",
    "read_recipe",
    "recipe_of",
    "recommend",
]
