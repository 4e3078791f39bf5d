"""Who may work on this stream right now, and how does everybody else's write get refused?"""

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
from leases.model import Event, Grant, Lease, LeaseInfo, Loss
from leases.protection import protect, unprotect
from leases.registry import SessionRegistry, StreamSession
from leases.store import EventLog, LeaseStore

__all__ = [
    "AsyncEventLog",
    "AsyncLeaseStore",
    "ConfigError",
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
    "SchemaOutdated",
    "SessionRegistry",
    "StaleToken",
    "StoreError",
    "StoreUnavailable",
    "StreamSession",
    "advance_watermark",
    "fence",
    "protect",
    "unprotect",
    "watermark_table",
]
