"""What can go wrong, each also the builtin that a caller would catch.

Every message says what was expected, what was found and what to do.
"""


class PerTAError(Exception):
    """Anything that peft_perta refuses or cannot do."""


class ConfigError(PerTAError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class DataError(PerTAError, ValueError):
    """A data set is empty, malformed, or holds a row without a loss."""


class AdapterError(PerTAError, ValueError):
    """An adapter is missing, misnamed, of another base, or of a kind that cannot be negated."""


class UnsupportedLayerError(PerTAError, TypeError):
    """A layer carries the forget adapter but cannot be read or edited."""


class NumericalError(PerTAError, ArithmeticError):
    """A loss, a statistic or a factor is not finite."""


class OutputError(PerTAError, OSError):
    """An output directory cannot be written, or is not ours to replace."""
