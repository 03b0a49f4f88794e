"""How a step that forgets and a step that retains become one: pure functions of two mappings of gradients.

To add one: a function under the contract of ``combiner.py`` in a file beside this one, and a row here.
"""

from .agreement import agreement
from .combiner import Combiner, Gradients
from .linear import add, normalise
from .projection import project_each, project_whole
from .signs import forget_where_agreed, retain_everywhere

COMBINERS: dict[str, Combiner] = {
    "sum": Combiner("gamma g_f + alpha g_r", add),
    "pcgrad": Combiner("g_f without what goes against g_r, tensor by tensor, plus g_r", project_each),
    "pcgrad-global": Combiner("the same, with one projection over all parameters", project_whole),
    "sago": Combiner("g_r where the signs of two elements conflict, g_f elsewhere", forget_where_agreed),
    "sago-prefer-retain": Combiner("g_r where they conflict, g_f + g_r elsewhere", retain_everywhere),
    "normalised": Combiner("both at unit length, added up", normalise),
}


__all__ = ["COMBINERS", "Combiner", "Gradients", "agreement"]
