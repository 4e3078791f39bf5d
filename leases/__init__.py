"""Who may work on this stream right now, and how does everybody else's write get refused?"""

from importlib.metadata import version

from leases.async_store import AsyncEventLog, AsyncLeaseStore
from leases.errors import (
    ConfigError,
    LeaseHeld,
    LeaseLost,
    LeaseNotHeld,
    LeasesError,
    OutcomeUnknown,
    SchemaOutdated,
    StaleToken,
    StoreError,
    StoreUnavailable,
)
from leases.fencing import advance_watermark, fence, watermark_table
from leases.keeper import Health
from leases.model import (
    Appended,
    AuditEntry,
    Blocker,
    Checkpoint,
    EndReason,
    Event,
    Grant,
    Lease,
    LeaseInfo,
    Loss,
    Pruned,
    RecordedEvent,
    State,
    WorkerInfo,
)
from leases.protection import protect, unprotect
from leases.registry import SessionRegistry, StreamSession
from leases.store import EventLog, LeaseStore

__all__ = [
    "Appended",
    "AsyncEventLog",
    "AsyncLeaseStore",
    "AuditEntry",
    "Blocker",
    "Checkpoint",
    "ConfigError",
    "EndReason",
    "Event",
    "EventLog",
    "Grant",
    "Health",
    "Lease",
    "LeaseHeld",
    "LeaseInfo",
    "LeaseLost",
    "LeaseNotHeld",
    "LeaseStore",
    "LeasesError",
    "Loss",
    "OutcomeUnknown",
    "Pruned",
    "RecordedEvent",
    "SchemaOutdated",
    "SessionRegistry",
    "StaleToken",
    "State",
    "StoreError",
    "StoreUnavailable",
    "StreamSession",
    "WorkerInfo",
    "__version__",
    "advance_watermark",
    "fence",
    "protect",
    "unprotect",
    "watermark_table",
]

__version__ = version("leases")
