"""Data in and out: rows and their formats, tokenised samples, batches, and files that are replaced atomically.

It also holds what every settings dataclass shares: fields that explain themselves, and checks.

Imports from: errors.
"""

from .answer_frame import AnswerFrame, answer_frame
from .encoding import encode_prompt, encode_row
from .loading import load_samples
from .output import check_output, replaced_directory, write_file
from .rows import ROW_KINDS, completion_text, read_rows, spread
from .samples import IGNORED, Batch, Sample, batches, fingerprint, padded
from .settings import check_setting, explained, is_count, is_int, is_number, setting

__all__ = [
    "IGNORED",
    "ROW_KINDS",
    "AnswerFrame",
    "Batch",
    "Sample",
    "answer_frame",
    "batches",
    "check_output",
    "check_setting",
    "completion_text",
    "encode_prompt",
    "encode_row",
    "explained",
    "fingerprint",
    "is_count",
    "is_int",
    "is_number",
    "load_samples",
    "padded",
    "read_rows",
    "replaced_directory",
    "setting",
    "spread",
    "write_file",
]
