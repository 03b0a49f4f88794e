"""What every test starts from: one thread, one seed, quiet libraries."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks
sys.path.insert(0, str(Path(__file__).parent))  # builders, laws, oracles and tables are imported by name

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging
from verified_here import verified_here

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile(
    "here",
    deadline=None,
    max_examples=60,
    derandomize=True,  # the same examples at every run: `make test` says the same twice
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _verified_here(request):
    """``verify`` starts no process, but for tests that are marked so."""
    if "fresh_process" in request.keywords:
        yield
    else:
        with verified_here():
            yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
