"""The ledger of requests to forget: which adapter meets which request, in a file to which entries are only added."""

from .audits import record_audit
from .book import LEDGER_NAME, Ledger, Request, ServedAdapter, read_ledger
from .check import check_ledger, open_adapters, open_rows
from .rebuild import rebuild_adapter, record_rebuilt
from .requests import add_request, list_requests, withdraw_request

__all__ = [
    "LEDGER_NAME",
    "Ledger",
    "Request",
    "ServedAdapter",
    "add_request",
    "check_ledger",
    "list_requests",
    "open_adapters",
    "open_rows",
    "read_ledger",
    "rebuild_adapter",
    "record_audit",
    "record_rebuilt",
    "withdraw_request",
]
