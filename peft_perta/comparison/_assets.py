"""The directory of a model and its rows: checks before any compute, and its identity."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..data import read_rows
from ..errors import ConfigError, DataError
from ..evaluation import SUITES, Splits
from ..model import hash_file
from .bench import SPLITS
from .settings import ROWS_OF_AUTHOR, ComparisonSettings


def check_assets(assets: Path, settings: ComparisonSettings) -> Splits:
    """Check everything that can be checked before any compute.

    Returns:
        The splits that only the suite reads.

    Raises:
        ConfigError: a file of the model is missing, or there are fewer forget authors than the settings name.
        DataError: a file of rows is missing or malformed, or no judged retain row has false answers.
    """
    for name in ("base/config.json", "task_adapter/adapter_config.json", "retain_adapter/adapter_config.json"):
        if not (assets / name).is_file():
            raise ConfigError(
                f"assets: expected {name} in {assets}, found none; give a directory that examples/demo_model/build.py "
                "wrote"
            )
    rows = {name: read_rows(assets / f"{name}.jsonl") for name in SPLITS}
    available, largest = len(rows["forget"]) // ROWS_OF_AUTHOR, max(settings.authors)
    if largest > available:
        raise ConfigError(
            f"authors: expected at most {available}, the number in {assets / 'forget.jsonl'}, found {largest}"
        )
    if not any(row.get("perturbed_answer") for row in rows["retain"][1::2]):
        raise DataError(
            f"{assets / 'retain.jsonl'}: expected 'perturbed_answer' in some of every second row, which are judged; "
            "found none"
        )
    splits = SUITES["tofu"].read(assets, None)
    return {name: split for name, split in splits.items() if name not in ("forget", "retain")}


def hash_assets(assets: Path) -> str:
    """SHA-256 of the model and its rows."""
    digest = hashlib.sha256()
    for path in sorted(assets.rglob("*")):
        if path.suffix in (".jsonl", ".json", ".safetensors"):
            digest.update(f"{path.relative_to(assets).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()
