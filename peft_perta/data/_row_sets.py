"""The rows of a data set with splits: a directory, or a name on the Hugging Face Hub. No code of a data set is run."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset, DatasetDict, ReadInstruction

from ..errors import DataError
from .limits import MOST_ROWS
from .row_files import DATA_SUFFIXES, TEXT_SUFFIXES, read_row_file, row_suffix
from .row_source import RowSource

T = TypeVar("T")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what ``save_to_disk`` writes


def is_hub_name(place: str) -> bool:
    """Whether it is written as a data set on the hub, ORG/NAME, and not as a file."""
    return bool(_HUB_NAME.fullmatch(place)) and row_suffix(Path(place)) not in (*DATA_SUFFIXES, *TEXT_SUFFIXES)


def read_hub(source: RowSource) -> list[dict]:
    """The rows of a data set on the Hugging Face Hub, kept in the cache of ``datasets``.

    Raises:
        DataError: ``datasets`` cannot load it, it needs code of its own, or its splits are not told apart.
    """
    loaded = _loading(source, lambda: datasets.load_dataset(source.place, source.config, split=source.split))
    if isinstance(loaded, DatasetDict):
        return _part(loaded, source)
    return _rows_of(loaded, source)


def read_directory(source: RowSource) -> list[dict]:
    """The rows of a directory: one that ``save_to_disk`` wrote, one of texts, or one of files as on the hub.

    Raises:
        DataError: it holds something else than regular files, or no rows; a file is damaged; or the split is unknown.
    """
    directory = Path(source.place)
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is no regular file, expected only files of rows in {directory}; remove it")
    if any((directory / name).exists() for name in _SAVED):
        _check_no_config(source)
        saved = _loading(source, lambda: datasets.load_from_disk(str(directory)))
        return _part(saved if isinstance(saved, DatasetDict) else {"train": saved}, source)
    if any(row_suffix(path) in DATA_SUFFIXES for path in files):
        return _part(_read_splits(source), source)
    texts = [path for path in files if row_suffix(path) in TEXT_SUFFIXES]
    if not texts:
        raise DataError(
            f"{directory}: expected files of rows ({', '.join((*DATA_SUFFIXES, *TEXT_SUFFIXES))}, each also .gz) or "
            "what save_to_disk wrote, found none; check the path"
        )
    _check_no_config(source)
    return _part({"train": [row for path in texts for row in read_row_file(path)]}, source)


def read_file(source: RowSource) -> list[dict]:
    """The rows of a file, or a part of them; as in ``datasets``, a file is the split 'train'."""
    _check_no_config(source)
    rows = read_row_file(Path(source.place))
    return rows if source.split is None else _part({"train": rows}, source)


def _read_splits(source: RowSource) -> dict[str, list[dict]]:
    """Split -> rows. ``datasets`` says which files are which split, by their names or by the directory's README."""
    root = Path(source.place).resolve()
    with tempfile.TemporaryDirectory() as cache:
        builder = _loading(source, lambda: datasets.load_dataset_builder(str(root), source.config, cache_dir=cache))
    files: Mapping[str, Sequence[str]] = builder.config.data_files or {}
    wanted = {split: paths for split, paths in files.items() if source.split is None or str(split) in source.split}
    if source.split is None and len(files) > 1:
        raise _unnamed(files, source)
    splits = {}
    for split, paths in (wanted or files).items():
        for path in map(Path, paths):
            if root not in path.resolve().parents:
                raise DataError(
                    f"{source.place}: expected only files within it, found {path}; remove it from the README"
                )
        splits[str(split)] = [row for path in paths for row in read_row_file(Path(path))]
    return splits


def _part(splits: Mapping[Any, Any], source: RowSource) -> list[dict]:
    """The rows that the source's split takes of these, each a list or a ``Dataset``."""
    if source.split is None:
        if len(splits) > 1:
            raise _unnamed(splits, source)
        return [row for rows in splits.values() for row in _rows_of(rows, source)]
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except Exception as error:  # ValueError, AssertionError, TypeError: one for each fault of the text
        named = source.split.partition("[")[0]
        nearest = difflib.get_close_matches(named, splits, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest and named not in splits else ""
        raise DataError(
            f"{source.place}: expected a split as datasets writes it, such as {next(iter(splits))}[:20], found "
            f"{source.split!r}; {hint}there are {', '.join(splits)}"
        ) from error
    return [row for part in parts for row in _rows_of(splits[part.splitname], source, slice(part.from_, part.to))]


def _rows_of(rows: Any, source: RowSource, part: slice = slice(None)) -> list[dict]:
    """The rows as they are stored: no image or sound that a row names is opened."""
    if not isinstance(rows, Dataset):
        return rows[part]
    chosen = range(len(rows))[part]
    if len(chosen) > MOST_ROWS:
        raise DataError(
            f"{source.place}: expected at most {MOST_ROWS:,} rows, found {len(chosen):,}; take a part of them"
        )
    tables: Any = _loading(source, lambda: rows.select(chosen).with_format("arrow").iter(1000))
    return _loading(source, lambda: [row for table in tables for row in table.to_pylist()])


def _loading(source: RowSource, load: Callable[[], T]) -> T:
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # datasets, huggingface_hub and pyarrow raise errors of many kinds
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{source.place}: datasets cannot load it ({text:.300}); expected a file of rows, a directory, or a data "
            "set without code of its own on the Hugging Face Hub (ORG/NAME:CONFIG[SPLIT]); check the name"
        ) from error


def _unnamed(splits: Mapping[Any, Any], source: RowSource) -> DataError:
    return DataError(
        f"{source.place} has the splits {', '.join(map(str, splits))}, expected the name of one: write "
        f"'{source.place}{f':{source.config}' if source.config else ''}[{next(iter(splits))}]'"
    )


def _check_no_config(source: RowSource) -> None:
    if source.config is not None:
        raise DataError(f"{source.place} has no configurations, found {source.config!r}; remove it, or check the path")
