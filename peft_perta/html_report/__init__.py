"""One self-contained HTML page of what was measured, and its pictures.

Imports from: ...
"""

from .calibration_picture import PICTURE_NAME, draw_calibration
from .page import write_html_report
from .report_data import report_data_of_logs, report_data_of_rows

__all__ = ["PICTURE_NAME", "draw_calibration", "report_data_of_logs", "report_data_of_rows", "write_html_report"]
