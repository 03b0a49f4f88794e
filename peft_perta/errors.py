"""The errors of the package. Each is also the builtin exception that a caller would catch.

Every message says what was expected, what was found and what to do.
"""


class PerTAError(Exception):
    """Base class of every error that peft_perta raises."""


class ConfigError(PerTAError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class DataError(PerTAError, ValueError):
    """A data set is empty or malformed, or holds a row without a loss."""


class AdapterError(PerTAError, ValueError):
    """An adapter is missing, has an invalid name, belongs to another base, or is of a kind that cannot be negated."""


class UnsupportedLayerError(PerTAError, TypeError):
    """A layer carries the forget adapter but cannot be read or edited."""


class NumericalError(PerTAError, ArithmeticError):
    """A loss, a gradient sum or a factor is not finite."""


class OutputError(PerTAError, OSError):
    """An output directory cannot be written, or was not written by peft_perta and so must not be replaced."""
