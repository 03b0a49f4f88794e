"""What is exported, loaded in the real runtimes: the same answers and log-probabilities as PEFT's stack.

    python -m benchmarks.serving --output DIR

Each runtime is a row of ``RUNTIMES``. What is not installed is listed as not run; run the command again where it is,
with the same output, and the table holds both.
"""
