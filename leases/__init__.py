"""Who may work on this stream right now, and how does everybody else's write get refused?"""

from importlib.metadata import version

from leases.async_session import AsyncStreamSession
from leases.async_store import AsyncEventLog, AsyncLeaseStore
from leases.backoff import Backoff
from leases.election import LeaderElection
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
    Happening,
    Lease,
    LeaseInfo,
    Loss,
    Pruned,
    RecordedEvent,
    State,
    WorkerEvent,
    WorkerInfo,
)
from leases.protection import protect, unprotect
from leases.registry import SessionRegistry
from leases.session import StreamSession
from leases.store import EventLog, LeaseStore
from leases.worker import Worker

__all__ = [
    "Appended",
    "AsyncEventLog",
    "AsyncLeaseStore",
    "AsyncStreamSession",
    "AuditEntry",
    "Backoff",
    "Blocker",
    "Checkpoint",
    "ConfigError",
    "EndReason",
    "Event",
    "EventLog",
    "Grant",
    "Happening",
    "Health",
    "LeaderElection",
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
    "Worker",
    "WorkerEvent",
    "WorkerInfo",
    "__version__",
    "advance_watermark",
    "fence",
    "protect",
    "unprotect",
    "watermark_table",
]

__version__ = version("leases")
