"""The ledger of requests to forget: which adapter meets which request, in a file to which entries are only added."""

from .book import LEDGER_NAME, Ledger, Request, read_ledger
from .check import check_ledger, open_adapters, open_rows
from .rebuild import rebuild_adapter
from .requests import add_request, list_requests, withdraw_request

__all__ = [
    "LEDGER_NAME",
    "Ledger",
    "Request",
    "add_request",
    "check_ledger",
    "list_requests",
    "open_adapters",
    "open_rows",
    "read_ledger",
    "rebuild_adapter",
    "withdraw_request",
]
