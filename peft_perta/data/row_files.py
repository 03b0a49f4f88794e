"""The rows of one file: JSON lines, a JSON list, CSV, Parquet or a text, each also as .gz."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from ..errors import DataError
from .json_files import parse_json
from .limits import MOST_ROWS, most_unpacked

_CODE_SUFFIXES = (".py", ".pkl", ".pickle", ".pt", ".pth")  # what runs when it is read
_MAGIC = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "a zip archive", b"ARROW1": "Arrow"}
_ROWS_OF_A_BATCH = 100  # what a column repeats is unpacked before it is counted


def row_suffix(path: Path) -> str:
    """The end of the file's name that tells its format, without .gz: ``rows.jsonl.gz`` is ``.jsonl``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_row_file(path: Path) -> list[dict]:
    """The rows of a file; one whose name tells no format holds JSON lines.

    Raises:
        DataError: it is no regular file, empty, of another format than its name says, damaged, larger than its limits,
            or of a kind that can run code.
    """
    suffix = row_suffix(path)
    if suffix in _CODE_SUFFIXES:
        raise DataError(
            f"{path}: scripts and pickles can run code and are never read; expected JSON lines, JSON, CSV, Parquet or "
            "text: export the rows to one of them"
        )
    content = _content(path)
    found = next((name for magic, name in _MAGIC.items() if content.startswith(magic)), None)
    name, reader = _FORMATS.get(suffix, ("JSON lines", read_json_rows))
    if found is not None and found != name:
        raise DataError(f"{path} is {found}, expected {name} by its name; rename it to what it is")
    try:
        rows = reader(content, path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever pyarrow raises on a damaged file
        text = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as {name} ({text:.200}); export the rows again") from error
    if not rows:
        raise DataError(f"{path} holds no rows, expected at least one; fill it or leave it out")
    if len(rows) > MOST_ROWS:
        raise _too_many(path)
    return rows


def read_json_rows(content: bytes, path: Path) -> list[dict]:
    """The rows of JSON lines, or of one JSON list of objects or texts."""
    text = _decoded(content, path, "one JSON object per line")
    if text.lstrip().startswith("["):
        return _listed(text, path)
    rows = []
    # splitlines would also split at characters that are legal inside a JSON string (U+2028, U+0085).
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found a {type(row).__name__}")
        rows.append(row)
    return rows


def _content(path: Path) -> bytes:
    """The bytes of a regular file, unpacked if it is named .gz."""
    if not path.is_file():
        raise DataError(f"{path} is no regular file, expected a file of rows; check the path")
    if path.suffix.lower() != ".gz":
        return path.read_bytes()
    most = most_unpacked(path.stat().st_size)
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is not gzip, or damaged ({error}); pack the rows again") from error
    if len(content) > most:
        raise _too_large(path, most)
    return content


def _decoded(content: bytes, path: Path, expected: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected {expected}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files


def _listed(text: str, path: Path) -> list[dict]:
    try:
        whole = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON ({error}); expected one JSON list of objects, or one JSON object per line"
        ) from error
    rows = [{"text": row} if isinstance(row, str) else row for row in whole]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, found a {type(row).__name__}")
    return rows


def _csv(content: bytes, path: Path) -> list[dict]:
    """Every value stays a text: the answer '42' is no number."""
    if not content.strip():
        return []
    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, 2**31 - 1))
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    names = pyarrow.csv.open_csv(pyarrow.BufferReader(content), reading, parsing).schema.names
    texts = pyarrow.csv.ConvertOptions(column_types={name: pyarrow.string() for name in names})
    table = pyarrow.csv.read_csv(pyarrow.BufferReader(content), reading, parsing, texts)
    return list(_of_batches(iter(table.to_batches()), len(content), path))


def _parquet(content: bytes, path: Path) -> list[dict]:
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    if file.metadata.num_rows > MOST_ROWS:
        raise _too_many(path)
    most = most_unpacked(len(content))
    groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
    if sum(group.total_byte_size for group in groups) > most:
        raise _too_large(path, most)
    return list(_of_batches(file.iter_batches(_ROWS_OF_A_BATCH, use_threads=False), len(content), path))


def _of_batches(batches: Iterator[pyarrow.RecordBatch], size: int, path: Path) -> Iterator[dict]:
    """The rows of record batches of a file of ``size`` bytes."""
    unpacked = 0
    for batch in batches:
        names = batch.schema.names
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise DataError(f"{path}: expected each column once, found {repeated!r} twice; rename one")
        columns = [
            column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
            for column in batch.columns
        ]
        unpacked += sum(column.nbytes for column in columns)
        if unpacked > most_unpacked(size):
            raise _too_large(path, most_unpacked(size))
        yield from pyarrow.RecordBatch.from_arrays(columns, names=names).to_pylist()


def _text(content: bytes, path: Path) -> list[dict]:
    """A text is one row."""
    text = _decoded(content, path, "a text")
    try:
        is_row = isinstance(parse_json(text.strip().partition("\n")[0]), dict)
    except ValueError:
        is_row = False
    if is_row:
        raise DataError(f"{path} holds JSON lines, expected a text by its name; rename it to .jsonl")
    return [{"text": text}] if text.strip() else []


def _too_many(path: Path) -> DataError:
    return DataError(f"{path}: expected at most {MOST_ROWS:,} rows, found more; take a part of them")


def _too_large(path: Path, most: int) -> DataError:
    return DataError(
        f"{path} unpacks to more than {most:,} bytes, which no file of rows of its size does; unpack it yourself if "
        "you trust it"
    )


_FORMATS: dict[str, tuple[str, Callable[[bytes, Path], list[dict[str, Any]]]]] = {  # end of the name -> how to read it
    ".jsonl": ("JSON lines", read_json_rows),
    ".json": ("JSON", read_json_rows),
    ".csv": ("CSV", _csv),
    ".parquet": ("Parquet", _parquet),
    ".txt": ("text", _text),
    ".md": ("text", _text),
}
DATA_SUFFIXES = tuple(suffix for suffix, (name, _) in _FORMATS.items() if name != "text")
TEXT_SUFFIXES = tuple(suffix for suffix, (name, _) in _FORMATS.items() if name == "text")
