"""Who may work on this stream right now, and how does everybody else's write get refused?

What few programs need, or needs asyncio, is imported when it is first asked for: a command starts sooner.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from leases.backoff import Backoff
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
from leases.store import EventLog, LeaseStore

if TYPE_CHECKING:
    from leases.async_session import AsyncStreamSession
    from leases.async_store import AsyncEventLog, AsyncLeaseStore
    from leases.election import LeaderElection
    from leases.keeper import Health
    from leases.registry import SessionRegistry
    from leases.session import StreamSession
    from leases.worker import Worker

_LATER = {
    "AsyncEventLog": "leases.async_store",
    "AsyncLeaseStore": "leases.async_store",
    "AsyncStreamSession": "leases.async_session",
    "Health": "leases.keeper",
    "LeaderElection": "leases.election",
    "SessionRegistry": "leases.registry",
    "StreamSession": "leases.session",
    "Worker": "leases.worker",
}
"""What is imported when it is asked for, and where it is."""

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


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
