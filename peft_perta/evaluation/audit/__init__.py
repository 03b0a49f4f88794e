"""An audit: is the knowledge gone as if it had never been learned, or only suppressed?

Every measure is a position between the retain-only model (0) and the full model (1), with an interval over rows; one
rule makes a verdict of them.
"""

from .evidence import Evidence, evidence_of, shown_measure
from .never_seen import NeverSeen
from .reading import AuditResult, read_audit
from .record import AUDIT_RECORD_NAME
from .run import Audit, audit
from .verdict import FORGOTTEN, PRESENT, RULE, STILL_THERE, SUPPRESSED, TRACE, Verdict, decide

__all__ = [
    "AUDIT_RECORD_NAME",
    "FORGOTTEN",
    "PRESENT",
    "RULE",
    "STILL_THERE",
    "SUPPRESSED",
    "TRACE",
    "Audit",
    "AuditResult",
    "Evidence",
    "NeverSeen",
    "Verdict",
    "audit",
    "decide",
    "evidence_of",
    "read_audit",
    "shown_measure",
]
