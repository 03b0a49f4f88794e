"""Data in and out: rows and their formats, tokenised samples, batches, and files that are replaced atomically.

It also holds what every settings dataclass shares: fields that explain themselves, and checks.

Imports from: errors.
"""

from .answer_frame import AnswerFrame, answer_frame
from .encoding import check_characters, encode_prompt, encode_row
from .json_files import parse_json, read_json
from .limits import time_limit
from .loading import drawn, load_samples
from .locking import hold_lock
from .notes import note, visible
from .output import (
    WRITTEN,
    check_file,
    check_output,
    claimed_directory,
    remove_directory,
    replaced_directory,
    write_file,
)
from .row_files import read_row_file
from .row_source import DEFAULT, GENERAL, SELF, RowSource
from .rows import ROW_KINDS, TEMPLATE_KEYS, completion_text, content_text, prompt_text, read_rows, row_kind, spread
from .samples import IGNORED, Batch, Sample, batches, check_disjoint, fingerprint, note_left_out, padded
from .settings import check_setting, explained, is_count, is_int, is_number, setting
from .shapes import Holds, read_as

__all__ = [
    "DEFAULT",
    "GENERAL",
    "IGNORED",
    "ROW_KINDS",
    "SELF",
    "TEMPLATE_KEYS",
    "WRITTEN",
    "AnswerFrame",
    "Batch",
    "Holds",
    "RowSource",
    "Sample",
    "answer_frame",
    "batches",
    "check_characters",
    "check_disjoint",
    "check_file",
    "check_output",
    "check_setting",
    "claimed_directory",
    "completion_text",
    "content_text",
    "drawn",
    "encode_prompt",
    "encode_row",
    "explained",
    "fingerprint",
    "hold_lock",
    "is_count",
    "is_int",
    "is_number",
    "load_samples",
    "note",
    "note_left_out",
    "padded",
    "parse_json",
    "prompt_text",
    "read_as",
    "read_json",
    "read_row_file",
    "read_rows",
    "remove_directory",
    "replaced_directory",
    "row_kind",
    "setting",
    "spread",
    "time_limit",
    "visible",
    "write_file",
]
