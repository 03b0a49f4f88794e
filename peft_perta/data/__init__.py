"""Data: rows and their formats, tokenised samples, batches; output that is written whole or not at all.

Imports from: errors.
"""

from .checks import check_setting, is_count, is_int, is_number
from .encoding import encode_prompt, encode_row
from .loading import load_samples
from .output import check_output, replaced_directory, write_file
from .rows import ROW_KINDS, completion_text, read_rows, spread
from .samples import IGNORED, Batch, Sample, batches, fingerprint, padded

__all__ = [
    "IGNORED",
    "ROW_KINDS",
    "Batch",
    "Sample",
    "batches",
    "check_output",
    "check_setting",
    "completion_text",
    "encode_prompt",
    "encode_row",
    "fingerprint",
    "is_count",
    "is_int",
    "is_number",
    "load_samples",
    "padded",
    "read_rows",
    "replaced_directory",
    "spread",
    "write_file",
]
