"""One self-contained HTML page that shows what unlearning changed, and a picture of the strength search.

Collect the numbers with ``report_data_of_logs`` or ``report_data_of_rows``, then write them with ``write_html_report``.

Imports from: errors, data, adapters, evaluation.
"""

from .audit_page import AUDIT_PAGE_NAME, write_audit_page
from .calibration_picture import PICTURE_NAME, draw_calibration
from .from_logs import report_data_of_logs
from .from_rows import report_data_of_rows
from .page import write_html_report
from .pictures import BLUE, RED, TradeOffPanel, save_figure, trade_off_figure
from .report_data import ReportData, ReportHeader

__all__ = [
    "AUDIT_PAGE_NAME",
    "BLUE",
    "PICTURE_NAME",
    "RED",
    "ReportData",
    "ReportHeader",
    "TradeOffPanel",
    "draw_calibration",
    "report_data_of_logs",
    "report_data_of_rows",
    "save_figure",
    "trade_off_figure",
    "write_audit_page",
    "write_html_report",
]
