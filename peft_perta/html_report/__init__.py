"""One self-contained HTML page of what was measured, and its pictures.

Imports from: ...
"""

from .calibration_picture import PICTURE_NAME, draw_calibration
from .page import write_html_report
from .pictures import BLUE, RED, TradeOffPanel, save_figure, trade_off_figure
from .report_data import report_data_of_logs, report_data_of_rows

__all__ = [
    "BLUE",
    "PICTURE_NAME",
    "RED",
    "TradeOffPanel",
    "draw_calibration",
    "report_data_of_logs",
    "report_data_of_rows",
    "save_figure",
    "trade_off_figure",
    "write_html_report",
]
