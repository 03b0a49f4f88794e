"""One self-contained HTML page of what was measured, and its pictures.

Imports from: ...
"""

from .calibration_picture import PICTURE_NAME, draw_calibration
from .page import write_page
from .report_data import evidence_of_logs, evidence_of_rows

__all__ = ["PICTURE_NAME", "draw_calibration", "evidence_of_logs", "evidence_of_rows", "write_page"]
