"""One job, one command: from rows that must go to an adapter with its evidence.

A recipe says everything; its steps are those of the single commands, and each is kept once it is done.

Imports from: errors, data, model, gradients, evaluation, adapters, perta, training, html_report, comparison.
"""

from .plan import Begun, Plan, clock
from .recipe import RECIPE_NAME, Recipe, Request, read_recipe, recipe_of
from .recommendation import RECOMMENDATIONS, recommend
from .run import JOB_NAME, OUTPUT, Job
from .starting_recipe import starting_recipe
from .unlearn import Unlearned, unlearn

__all__ = [
    "JOB_NAME",
    "OUTPUT",
    "RECIPE_NAME",
    "RECOMMENDATIONS",
    "Begun",
    "Job",
    "Plan",
    "Recipe",
    "Request",
    "Unlearned",
    "clock",
    "read_recipe",
    "recipe_of",
    "recommend",
    "starting_recipe",
    "unlearn",
]
