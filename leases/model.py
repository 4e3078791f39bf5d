"""The values: frozen, without behaviour that needs a database.

Every time in them is aware, in UTC, and the *database's*; none was read from this machine's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

JSON = Any
"""Whatever `json.dumps` takes: None, bool, int, float, str, and lists and dicts of them."""

DEFAULT_POOL: Final = "default"


@dataclass(frozen=True, slots=True)
class Lease:
    """One grant as its owner knows it: what every heartbeat, fence and release must name.

    `expires_at` is exclusive: at `expires_at == now` the lease has expired. `remaining` is how long it had to
    live by the database's clock when the database answered; count it from *before* the request was sent. `failures`
    says how often in a row, before this grant, the work on the stream has failed.
    """

    stream_id: str
    owner: str
    fencing_token: int
    expires_at: datetime
    acquired_at: datetime
    pool: str
    remaining: timedelta
    failures: int = 0


class State(StrEnum):
    """What an operator wants to know of a stream first."""

    HELD = "held"
    EXPIRED = "expired"
    FREE = "free"
    RESTING = "resting"
    """Free, but not to be claimed yet: its handler failed, and the backoff is not over."""
    PAUSED = "paused"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A row of the lease table, as an observer sees it at `seen_at` (the database's clock).

    `live` says whether the lease was held and unexpired then. A paused or retired stream may still be live: its
    owner is about to end its work. `available_at`, `failures` and `last_error` are the backoff of a stream whose
    handler fails.
    """

    stream_id: str
    owner: str | None
    expires_at: datetime | None
    fencing_token: int
    pool: str
    acquired_at: datetime | None
    claim_id: UUID | None
    available_at: datetime
    failures: int
    last_error: str | None
    paused_at: datetime | None
    paused_by: str | None
    pause_reason: str | None
    registered_at: datetime
    retired_at: datetime | None
    live: bool
    seen_at: datetime

    @property
    def state(self) -> State:
        if self.retired_at is not None:
            return State.RETIRED
        if self.paused_at is not None:
            return State.PAUSED
        if self.owner is None:
            return State.RESTING if self.available_at > self.seen_at else State.FREE
        return State.HELD if self.live else State.EXPIRED

    @property
    def remaining(self) -> timedelta | None:
        """Time left on the lease when it was seen (negative: expired so long ago); None when nobody holds it."""
        return None if self.expires_at is None else self.expires_at - self.seen_at


class EndReason(StrEnum):
    """How a grant ended."""

    RELEASED = "released"
    EXPIRED = "expired"
    STOLEN = "stolen"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Grant:
    """One term of ownership, from the acquire that raised the token to its end.

    `ended_at` is None while nobody has ended the grant; its owner may be dead all the same: then the lease is past
    its `expires_at`, which is the row's while the grant is the stream's last one, and None afterwards.
    """

    stream_id: str
    fencing_token: int
    owner: str
    granted_at: datetime
    ended_at: datetime | None
    end_reason: EndReason | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the work on a stream has got to: kept across owners, written only under the fence."""

    stream_id: str
    checkpoint: JSON
    fencing_token: int
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Event:
    """An event to append. `event_id` is the producer's idempotency key: the second of its name is left out."""

    event_id: str
    payload: JSON


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event of the log. `seq` counts the events of its stream from 1, without gaps, in commit order."""

    stream_id: str
    event_id: str
    seq: int
    fencing_token: int
    recorded_at: datetime
    payload: JSON


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append did: how many events are new, which were there before, and the stream's last `seq`."""

    count: int
    duplicates: tuple[str, ...]
    last_seq: int


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What an operator did to a stream."""

    at: datetime
    actor: str
    action: str
    stream_id: str | None
    token_before: int | None
    token_after: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Membership:
    """What a process that keeps leases says of itself. One without a pool does not compete for streams."""

    worker_id: str
    host: str
    pid: int
    version: str
    pool: str | None = None
    capacity: int | None = None
    weight: float = 1.0
    incarnation: UUID | None = None


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A row of the fleet, as an observer sees it at `seen_at` (the database's clock).

    `lease_count` is how many leases the worker says that it holds; `beaten_at` when its last heartbeat was.
    """

    worker_id: str
    host: str
    pid: int
    version: str
    started_at: datetime
    expires_at: datetime
    state: str
    pool: str | None
    capacity: int | None
    weight: float
    lease_count: int
    beaten_at: datetime | None
    incarnation: UUID | None
    seen_at: datetime

    @property
    def live(self) -> bool:
        return self.expires_at > self.seen_at


@dataclass(frozen=True, slots=True)
class Blocker:
    """A database session that holds a lease's row: whom an operator must wait for, or end."""

    pid: int
    application: str
    user: str
    address: str
    state: str
    since: datetime


class Loss(StrEnum):
    """Why a session lost its lease."""

    EXPIRED = "expired"
    """It was not extended in time: its process stood still, or the database could not be reached."""
    TAKEN = "taken"
    """Another owner has it: an operator moved it, or it was claimed after it expired."""
    REVOKED = "revoked"
    """An operator ended it, and nobody has it now."""
    RELEASED = "released"
    """It was released in its own name, by somebody who knew the grant."""
    STALLED = "stalled"
    """Its handler made no progress for longer than the worker allows: the worker let it go."""
    OVERDUE = "overdue"
    """Its handler was asked to end, and did not in time: the worker let it go."""


@dataclass(frozen=True, slots=True)
class Stray:
    """A row in an owner's name that its heartbeat did not know: an operator's grant, or a claim's without answer."""

    stream_id: str
    fencing_token: int
    claim_id: UUID | None
    live: bool


def by_operator(claim_id: UUID | None) -> bool:
    """Whether a grant was made by an operator: those have a UUID of version 5, an owner's own attempts one of 4."""
    return claim_id is not None and claim_id.version == 5


@dataclass(frozen=True, slots=True)
class Ending:
    """A grant to be let go, and how: at once, or after `backoff`, with what went wrong if something did."""

    lease: Lease
    backoff: timedelta = timedelta(0)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Released:
    """What became of a batch that was to be let go, by stream_id: `locked` ones are still held, all others are not."""

    released: frozenset[str]
    locked: frozenset[str]


@dataclass(frozen=True, slots=True)
class Renewal:
    """The answer to a heartbeat: only what went otherwise than hoped, by stream_id.

    `skipped`: still mine, but its row was locked: not extended, try again with the next beat. `lost`: no longer
    mine. `ending`: extended, but paused or retired: finish, then release. `worker_known`: the worker's own row was
    there and has been extended (or none was asked for). `strays`: rows in the owner's name that were not asked for.
    """

    skipped: frozenset[str]
    lost: Mapping[str, Loss]
    ending: frozenset[str]
    worker_known: bool
    strays: frozenset[str] = frozenset()


class Happening(StrEnum):
    """What can happen to a worker and its streams."""

    STARTED = "started"
    GRANTED = "granted"
    """A claim, or an adoption, opened a session."""
    RENEWED = "renewed"
    """A heartbeat has extended all leases but those that others tell of; `count` says how many."""
    RELEASED = "released"
    SHED = "shed"
    """A session is asked to end, because the worker holds more than its share."""
    FAILED = "failed"
    """A handler raised; the stream is released and rests. `reason` is the error."""
    STALLED = "stalled"
    """A handler made no progress in time; `lost` follows."""
    LOST = "lost"
    """A session has ended without being released; `reason` is the `Loss`."""
    RETIRED = "retired"
    """A stream has vanished from the worker's source, and was retired."""
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """One thing that happened: for metrics and logs. A worker's own has no stream and no token."""

    happening: Happening
    owner: str
    stream_id: str | None = None
    fencing_token: int | None = None
    reason: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Observed:
    """A lease as an operator's first step found it, and ended it: what the second step must supersede."""

    stream_id: str
    owner: str | None
    fencing_token: int
    live: bool


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows a prune deleted, by table."""

    grants: int
    events: int
    audit: int
    checkpoints: int
    workers: int
