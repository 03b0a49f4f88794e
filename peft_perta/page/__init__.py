"""What was done and what was measured, as one HTML page for the person who answers for it."""

from .contents import Evidence
from .page import write_page

__all__ = ["Evidence", "write_page"]
